"""What happens to a captured graph before it is planned: it is normalised, and its ops are put in order.

`normalise` runs the passes over the fx graph (views, scatters, sums, strides), `reorder` the one over a Graph's ops.
Every pass keeps each bit of what the step computes.
"""

from graphplan.passes.joint import Extend, is_random, normalise
from graphplan.passes.order import reorder
from graphplan.passes.recurrent import recurrent_layers_that_train
from graphplan.passes.strides import made_up
from graphplan.passes.views import aliased_input, view_readers

__all__ = [
    "Extend",
    "aliased_input",
    "is_random",
    "made_up",
    "normalise",
    "recurrent_layers_that_train",
    "reorder",
    "view_readers",
]
