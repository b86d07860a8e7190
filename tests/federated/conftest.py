from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from graphplan.federated import Frontier, RunConfig
from graphplan.federated.execution import Trainer, measure_ops
from graphplan.federated.task import task_of
from graphplan.federated.testing import run_in_process

Run = Callable[[RunConfig], dict[str, Any]]

FLEET = """\
[[class]]
name = "tight"
share = 1
memory = [0.75, 0.95]
speed = 0.5
uplink_mbps = 8.0
downlink_mbps = 40.0

[[class]]
name = "wide"
share = 1
memory = [1.08, 1.15]
speed = 1.0
uplink_mbps = 20.0
downlink_mbps = 100.0
"""


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a profile of the small cnn: memory as measured, times by bytes, so that no load moves a plan.

    Measured on one thread, as clients run: some processors' convolutions take more scratch on two.
    """
    path = tmp_path_factory.mktemp("device") / "device.json"
    task, threads = task_of(RunConfig(model="models_zoo:cnn")), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = Trainer(task).profile()
        measure_ops(task, found, "exact", whole=True)
    finally:
        torch.set_num_threads(threads)
    found.samples.update({k: replace(s, cost_ns=20_000 + s.touched_bytes) for k, s in found.samples.items()})
    found.save(path)
    return str(path)


@pytest.fixture(scope="session")
def config(device: str) -> RunConfig:
    """Four clients, two of which need a plan; exact ones. Solves end proven, long before their clock."""
    return RunConfig(
        method="random_hybrid", model="models_zoo:cnn", partition="iid", clients=4, per_round=4, rounds=1, fleet=FLEET,
        points=4, time_limit=300.0, device=device, seed=2, codecs="exact",
    )  # fmt: skip


@pytest.fixture(scope="session")
def frontiers() -> dict[Hashable, Frontier]:
    """Plans of the small cnn that depend on no weights: found once."""
    return {}


@pytest.fixture(scope="session")
def run(frontiers: dict[Hashable, Frontier]) -> Run:
    """Runs on the double in which nothing goes wrong, each made once for all tests that look at it."""

    def made(config: RunConfig) -> dict[str, Any]:
        shared = config.model == "models_zoo:cnn" and config.codecs == "exact" and not config.program
        return run_in_process(config, made=frontiers if shared and config.method != "compress_only" else None)

    return cache(made)
