"""FedAvg (McMahan et al. 2017): random clients, plain PyTorch; whoever has not the memory drops out of the round."""

from graphplan.federated.method import Method
from graphplan.federated.plans import Execution
from graphplan.federated.selection import Random

FEDAVG = Method(
    "fedavg",
    "random selection, no plan; who lacks the memory drops out",
    Random,
    Execution(planned=False),
    asks_unfit=True,
)
