"""ProgramStep: a program bound to its tensors and an optimizer: a call is one training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from graphplan.capture import flatten_call
from graphplan.program.document import Geometry, need
from graphplan.state import lookup
from graphplan.step.optimizer import Slots
from graphplan.step.program import WholeProgram
from graphplan.step.train import call_arguments
from graphplan.whole import WholeStep


class ProgramStep(WholeStep):
    """What `Program.bind` returns: `loss = step(inputs, targets)` as TrainStep's, without the model's source."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, slots: Slots, program: WholeProgram, inputs: Sequence[Geometry]
    ) -> None:
        """Hold what a step needs."""
        self.model, self.optimizer = model, optimizer
        self._slots, self._program, self._inputs = slots, program, tuple(inputs)
        self._find = lookup(model)

    def warm(self) -> None:
        """Run each call once on tensors of zeros: what kernels set up for themselves is then in place.

        Takes the memory of one call at a time.
        """
        settings = dict(self.optimizer.param_groups[0])

        def made(node: fx.Node) -> Any:
            value = node.meta["val"]
            if isinstance(value, dict):
                return dict(settings) if value else {}
            parts = value if isinstance(value, tuple | list) else (value,)
            zeros = [Geometry.of(v).empty().zero_() if isinstance(v, Tensor) else v for v in parts]
            return zeros if isinstance(value, tuple | list) else zeros[0]

        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for node in self._program.module.graph.find_nodes(op="call_function"):
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), made)
                node.target(*args, **kwargs)

    def __call__(self, inputs: Any, targets: Any = None) -> Tensor:
        """Train on one batch of the program's geometry; return the loss.

        Raises:
            ProgramError: another number of tensors, or one of another shape, strides or dtype.
        """
        args, kwargs = call_arguments(inputs, targets)
        tensors = [t.detach() for t in flatten_call(args, kwargs)[1]]
        need(len(tensors) == len(self._inputs), f"the program takes {len(self._inputs)} tensors, not {len(tensors)}")
        for i, (t, wanted) in enumerate(zip(tensors, self._inputs, strict=True)):
            need(Geometry.of(t) == wanted, f"tensor {i} is {Geometry.of(t)}; the program takes {wanted}")
        return self._program.run(self._find, self._slots, tensors)
