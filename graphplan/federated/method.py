"""Method: what tells one federated system from another. One file in methods/ and one line in METHODS add one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flwr.serverapp.strategy import FedAvg

from graphplan.federated.plans import Execution
from graphplan.federated.selection import Selector

# Flower's strategies serve as aggregators here: they must not ask any client themselves. (A fraction of zero would
# do it too, with a warning that training is skipped.)
AGGREGATE_ONLY: dict[str, Any] = {
    "fraction_train": 1e-9,
    "fraction_evaluate": 1e-9,
    "min_train_nodes": 0,
    "min_evaluate_nodes": 0,
    "min_available_nodes": 0,
}


def _fedavg() -> FedAvg:
    return FedAvg(**AGGREGATE_ONLY)


@dataclass(frozen=True, slots=True)
class Method:
    """One system.

    `selector(seed)` makes its selection; `execution` says how clients run a step; `aggregator` makes the Flower
    strategy that averages. `asks_unfit`: the server does not know budgets, so that clients are asked that must
    refuse. `widths`: fractions of the model's channels, of which the first that fits every client is trained.
    """

    name: str
    description: str
    selector: Callable[[int], Selector]
    execution: Execution = field(default_factory=Execution)
    aggregator: Callable[[], FedAvg] = _fedavg
    proximal_mu: float = 0.0
    asks_unfit: bool = False
    widths: tuple[float, ...] = (1.0,)
