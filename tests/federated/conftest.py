from __future__ import annotations

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when flwr is imported

from pathlib import Path

import pytest

from graphplan.federated import RunConfig
from graphplan.federated.execution import Trainer
from graphplan.federated.task import task_of

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
memory = [1.01, 1.1]
speed = 1.0
uplink_mbps = 20.0
downlink_mbps = 100.0
"""


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of this machine's profile of the small cnn: the same plans and clock in every process."""
    path = tmp_path_factory.mktemp("device") / "device.json"
    Trainer(task_of(RunConfig(model="models_zoo:cnn"))).profile().save(path)
    return str(path)


@pytest.fixture
def config(device: str) -> RunConfig:
    """Four clients, two of which need a plan."""
    return RunConfig(
        model="models_zoo:cnn", partition="iid", clients=4, per_round=4, rounds=1, fleet=FLEET, points=4,
        time_limit=30.0, device=str(Path(device)), seed=2,
    )  # fmt: skip
