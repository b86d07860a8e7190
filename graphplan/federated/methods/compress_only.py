"""Compression alone (ActNN, Chen et al. 2021, is alike): every codec of the table, rounding ones too.

Nothing is computed twice.
"""

from graphplan.federated.method import Method
from graphplan.federated.plans import Execution
from graphplan.federated.selection import Random

COMPRESS_ONLY = Method(
    "compress_only", "random selection; codecs only", Random, Execution(codecs="lossy", recompute=False)
)
