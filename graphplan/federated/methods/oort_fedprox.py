"""Oort's selection (Lai et al. 2021) with FedProx (Li et al. 2020), among clients that need no plan."""

from flwr.serverapp.strategy import FedProx

from graphplan.federated.method import AGGREGATE_ONLY, Method
from graphplan.federated.plans import Execution
from graphplan.federated.selection import Oort

MU = 0.01

OORT_FEDPROX = Method(
    "oort_fedprox",
    "Oort's selection, FedProx, among those that need no plan",
    Oort,
    Execution(planned=False),
    aggregator=lambda: FedProx(**AGGREGATE_ONLY, proximal_mu=MU),
    proximal_mu=MU,
)
