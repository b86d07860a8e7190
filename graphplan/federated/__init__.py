"""Federated training with a plan for each client's memory: a Flower app. METHODS is the table of systems."""

try:
    import flwr  # noqa: F401
except ModuleNotFoundError as e:  # the extra is not installed
    raise ModuleNotFoundError(
        "graphplan.federated needs Flower: pip install 'graphplan[federated]'", name="flwr"
    ) from e

from graphplan.federated.config import FederatedError, RunConfig
from graphplan.federated.fleet import DEFAULT_FLEET, read_fleet
from graphplan.federated.frontier import Frontier, FrontierCache
from graphplan.federated.method import Method
from graphplan.federated.methods import METHODS

__all__ = [
    "DEFAULT_FLEET",
    "METHODS",
    "FederatedError",
    "Frontier",
    "FrontierCache",
    "Method",
    "RunConfig",
    "read_fleet",
]
