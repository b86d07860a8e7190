"""Each measurement in a process of its own, with no heap, caches or threads of the one before; rows as JSON files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# glibc keeps what is freed: else it gives memory back in the middle of a step, by its own luck, and faults it in again.
KEPT = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}
RESULTS = ROOT / "bench" / "results"  # in the repository: what the pages are made from


def run_again(
    module: str, *words: object, minutes: float | None = None, spin: bool = False, kept: bool = False
) -> None:
    """Run `python -m bench.MODULE WORDS`, and say how it ended; None: as long as it takes.

    `spin`: threads wait for work as torch's do by default, where nothing else is to run. Else they sleep: those that
    spin while they wait would time each other, not the model. `kept`: with KEPT.
    """
    env = {**({} if spin else {"OMP_WAIT_POLICY": "PASSIVE"}), **os.environ, **(KEPT if kept else {})}
    command = [sys.executable, "-m", f"bench.{module}", *map(str, words)]
    try:
        limit = None if minutes is None else 60 * minutes
        done = subprocess.run(command, cwd=ROOT, env=env, check=False, timeout=limit)
        ended = "done" if done.returncode == 0 else "FAILED"
    except subprocess.TimeoutExpired:
        ended = "out of time"
    print(f"{' '.join(command[2:5])}: {ended}", flush=True)


def save_row(name: str, row: dict[str, Any]) -> None:
    """Write one row."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(row, indent=1))


def rows_of(prefix: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the rows measured so far."""
    return [json.loads(p.read_text()) for n in names if (p := RESULTS / f"{prefix}{n}.json").exists()]
