"""Recomputation alone, chosen greedily by size, lifetime and cost (Melon, Wang et al. 2022; Sage is alike)."""

from graphplan.federated.method import Method
from graphplan.federated.plans import Execution
from graphplan.federated.selection import Random

RECOMPUTE_ONLY = Method(
    "recompute_only", "random selection; greedy recomputation", Random, Execution(codecs="none", solver="melon")
)
