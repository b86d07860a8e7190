"""Channel-wise mixed bits of what a convolution's weight gradient alone reads: `functions.mixed`.

There every input channel meets the same output gradients, so that all channels are equally sensitive and their
ranges alone say where bits are worth most. What other ops read has channels of unequal sensitivity, known only in the
backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphplan import functions
from graphplan.codecs.lossy import Coder, Lossy
from graphplan.graph import Graph, GraphOp

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Mixed(Lossy):
    """Rounds channels to `bits` an element on average."""

    def warm_up(self, graph: Graph) -> None:
        """Compile nothing: channels are gathered into pieces smaller than compiled kernels work on."""

    def _serves(self, graph: Graph, op: GraphOp, node: fx.Node, storage: int) -> bool:
        args, val = op.node.args, node.meta["val"]
        if op.node.target is not aten.convolution_backward.default or args[1] is not node or val.dim() != 4:
            return False
        others = (a for i, a in enumerate(args) if i != 1 and isinstance(a, fx.Node))
        if args[9] != 1 or any(storage in graph.storages_of[a.name] for a in others):
            return False
        return any(val.is_contiguous(memory_format=f) for f in (torch.contiguous_format, torch.channels_last))

    def _coded(self, node: fx.Node) -> tuple[int, Coder]:
        planes = _planes(node.meta["val"])
        coder = Coder(functions.quantise_channels, (planes, self.bits), functions.dequantise_channels, (planes,))
        return functions.mixed_bytes(planes, self.bits), coder


def _planes(val: torch.Tensor) -> functions.Planes:
    """Return how images lie in memory: channels last are planes of one element."""
    n, c, h, w = val.shape
    return (n, c, h * w) if val.is_contiguous() else (n * h * w, c, 1)


MIXED3 = Mixed("mixed3", 3)
