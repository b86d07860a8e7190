"""The real path: a SuperLink and SuperNodes as processes of their own, each with its own budget."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest

from graphplan.federated import RunConfig
from graphplan.federated.launch import run_deployment
from graphplan.federated.testing import run_in_process


def _flower_processes() -> set[int]:
    """Those of this process's descendants and of its sessions that are Flower's."""
    found = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any("flower-super" in part for part in process.info["cmdline"] or ()):
            found.add(process.info["pid"])
    return found


@pytest.mark.slow
@pytest.mark.ci
def test_two_rounds_on_three_supernodes_with_different_budgets(config: RunConfig) -> None:
    before = _flower_processes()
    config = replace(config, method="random_hybrid", fleet="", clients=3, per_round=3, rounds=2)
    budgets = ("1300KB", "1500KB", "2MB")
    report = run_deployment(config, budgets, lambda event: None).json()
    assert [(r["taking_part"], r["failed"], r["refused_for_memory"]) for r in report["rounds"]] == [(3, 0, 0)] * 2
    by_client = [(c["budget_bytes"], c["budget_source"]) for c in report["clients"]]
    assert by_client == [(1_300_000, "node config"), (1_500_000, "node config"), (2_000_000, "node config")]
    for client in report["clients"]:
        assert client["measured_peak_bytes"] <= client["budget_bytes"]
    peaks = [c["planned_peak_bytes"] for c in report["clients"]]
    assert peaks == sorted(set(peaks))  # each has its own plan
    assert _flower_processes() <= before
    # Plans change no number: the same clients with memory to spare, in one process, end where these did.
    roomy = config.fleet or '[[class]]\nname="a"\nshare=1\nmemory=[2.0,2.0]\nspeed=1\nuplink_mbps=1\ndownlink_mbps=1\n'
    assert run_in_process(replace(config, fleet=roomy))["loss"] == report["loss"]
