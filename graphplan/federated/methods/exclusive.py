"""ExclusiveFL: FedAvg among the clients that can hold the unplanned step; all others are never asked."""

from graphplan.federated.method import Method
from graphplan.federated.plans import Execution
from graphplan.federated.selection import Random

EXCLUSIVE = Method("exclusive", "random selection among those that need no plan", Random, Execution(planned=False))
