"""WholeStep: what measuring and checking need to know of a planned step that updates its parameters itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


class WholeStep(ABC):
    """Forward, loss, backward and update in one call. `model` and `optimizer` are the user's own."""

    model: nn.Module
    optimizer: Optimizer

    @abstractmethod
    def __call__(self, inputs: Any, targets: Any = None) -> Tensor:
        """Train on one batch; return the loss."""

    def state_tensors(self) -> list[Tensor]:
        """Return the tensors of the optimizer's state."""
        return [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
