"""AllSmall: one narrow model for everyone, as wide as the weakest client can train unplanned."""

from graphplan.federated.method import Method
from graphplan.federated.plans import Execution
from graphplan.federated.selection import Random

ALLSMALL = Method(
    "allsmall",
    "random selection, no plan; a model narrow enough for every client",
    Random,
    Execution(planned=False),
    widths=(1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625),
)
