"""The demo: the operating system refuses memory to the unplanned training, and the planned one finishes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from graphplan import Plan
from graphplan.cap import Cap, is_refusal
from graphplan.cli import app, demo
from graphplan.cli.output import BAD_INPUT


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits anonymous memory by RLIMIT_DATA")
def test_unplanned_is_refused_and_planned_finishes(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["demo", "--steps", "3", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    seen = json.loads(result.stdout)
    assert seen["unplanned_refused"]
    assert "memory" in seen["unplanned_capped"]["refusal"] or "alloc" in seen["unplanned_capped"]["refusal"]
    assert seen["planned_finished"]
    assert len(seen["planned_capped"]["losses"]) == 3
    assert seen["planned_capped"]["peak_bytes"] <= seen["budget_bytes"] < seen["unplanned"]["peak_bytes"]
    assert seen["largest_loss_difference"] <= 1e-4
    assert Plan.load(out / "plan.json").budget_bytes == seen["budget_bytes"]
    assert (out / "timeline.png").stat().st_size > 10_000


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "NEEDED", {"a_package_that_is_not_here": "its-name-on-pypi"})
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == BAD_INPUT
    assert "pip install its-name-on-pypi" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits anonymous memory by RLIMIT_DATA")
def test_a_refusal_that_does_not_name_memory_is_said_to_be_one() -> None:
    with Cap(1 << 40) as cap:
        raise RuntimeError("could not create a primitive")
    assert cap.refusal == "RuntimeError: could not create a primitive (oneDNN was given no memory)"


FRAGMENTED = """
import torch
from graphplan.cap import Cap
from graphplan.heap import tune_malloc
tune_malloc()
some = [torch.empty(12_000) for _ in range(4000)]  # 192 MB in blocks of the heap
kept = some[::50]
del some  # nearly all of it is free, and none can go back to the system
for allowance in (60_000_000, 130_000_000):
    with Cap(allowance) as cap:
        asked = [torch.empty(12_000) for _ in range(2000)]  # 96 MB
    print(cap.refusal is None)
    asked = []
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits anonymous memory by RLIMIT_DATA")
def test_what_is_free_in_the_heap_is_no_memory_beyond_the_cap() -> None:
    done = subprocess.run([sys.executable, "-c", FRAGMENTED], capture_output=True, text=True, check=True, timeout=200)
    assert done.stdout.split() == ["False", "True"]


def test_what_counts_as_refused_memory() -> None:
    assert is_refusal(MemoryError())
    assert is_refusal(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"))
    assert is_refusal(RuntimeError("std::bad_alloc"))
    assert not is_refusal(RuntimeError("shape mismatch"))
