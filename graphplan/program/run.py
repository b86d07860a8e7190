"""ProgramStep: a program bound to its tensors and an optimizer: a call is one training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from graphplan.capture import flatten_call
from graphplan.program.document import Geometry, need
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
        return self._program.run(self.model, self._slots, tensors)
