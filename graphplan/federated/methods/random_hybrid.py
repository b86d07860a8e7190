"""FedHybrid's plans under random selection: what its selection adds."""

from graphplan.federated.method import Method
from graphplan.federated.plans import HYBRID
from graphplan.federated.selection import Random

RANDOM_HYBRID = Method("random_hybrid", "random selection; keep, recompute or compress by plan", Random, HYBRID)
