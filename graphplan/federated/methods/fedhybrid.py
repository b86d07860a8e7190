"""FedHybrid (Tam et al. 2024): memory-aware selection, a plan for each client's budget, hybrid execution."""

from graphplan.federated.method import Method
from graphplan.federated.plans import HYBRID
from graphplan.federated.selection import MemoryAwareUcb

FEDHYBRID = Method("fedhybrid", "memory-aware selection; keep, recompute or compress by plan", MemoryAwareUcb, HYBRID)
