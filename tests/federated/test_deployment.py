"""The real path: a SuperLink and SuperNodes as processes of their own, each with its own budget."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest

from graphplan.federated import RunConfig
from graphplan.federated.launch import run_deployment, stop, workplace

Run = Callable[[RunConfig], dict[str, Any]]


def _flower_processes(mark: str) -> list[int]:
    """Flower's processes that were started under this mark; other runs on the machine have none or another."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("GRAPHPLAN_TEST") == mark
            if ours and any("flower-super" in part for part in process.cmdline()):
                found.append(process.pid)
    return found


@pytest.mark.slow
@pytest.mark.ci
def test_two_rounds_on_three_supernodes_with_different_budgets(
    config: RunConfig, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = str(uuid.uuid4())
    monkeypatch.setenv("GRAPHPLAN_TEST", mark)
    config = replace(config, method="random_hybrid", fleet="", clients=3, per_round=3, rounds=2)
    budgets = ("1300KB", "1500KB", "2MB")
    seen: list[int] = []
    report = run_deployment(config, budgets, lambda event: seen.extend(_flower_processes(mark))).json()
    assert seen  # the mark finds them while they run
    assert [(r["taking_part"], r["failed"], r["refused_for_memory"]) for r in report["rounds"]] == [(3, 0, 0)] * 2
    by_client = [(c["budget_bytes"], c["budget_source"]) for c in report["clients"]]
    assert by_client == [(1_300_000, "node config"), (1_500_000, "node config"), (2_000_000, "node config")]
    for client in report["clients"]:
        assert client["measured_peak_bytes"] <= client["budget_bytes"]
    peaks = [c["planned_peak_bytes"] for c in report["clients"]]
    assert peaks == sorted(set(peaks))  # each has its own plan
    assert not _flower_processes(mark)
    # Plans change no number: the same clients with memory to spare, in one process, end where these did.
    roomy = '[[class]]\nname="a"\nshare=1\nmemory=[2.0,2.0]\nspeed=1\nuplink_mbps=1\ndownlink_mbps=1\n'
    assert run(replace(config, fleet=roomy))["loss"] == report["loss"]


@pytest.mark.slow
def test_a_supernode_that_restarts_takes_part_again(config: RunConfig) -> None:
    """A process ends while the run goes on, and another begins with the same partition: it is met and asked."""
    config = replace(config, method="random_hybrid", fleet="", clients=3, per_round=3, rounds=4, timeout=150.0)
    with workplace(config) as place:
        place.start_superlink()
        nodes = [place.start_supernode(i, 3, "2MB") for i in range(3)]

        def listen(event: dict[str, Any]) -> None:
            if event["event"] == "round" and event["round"] == 1:
                stop(nodes[2])
                nodes[2] = place.start_supernode(2, 3, "1500KB")

        report = place.run((), listen).json()
    first, *_, last = report["rounds"]
    assert (first["clients"], last["clients"]) == ([0, 1, 2], [0, 1, 2])
    assert len(report["rounds"]) == 4
    assert all({0, 1} <= set(r["clients"]) for r in report["rounds"])
    back = report["clients"][2]
    assert back["budget_bytes"] == 1_500_000
    assert back["measured_peak_bytes"] <= 1_500_000
