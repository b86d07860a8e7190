"""Every error that graphplan raises on purpose. Each message says what was wrong, where, and what would work."""

from __future__ import annotations


class GraphplanError(Exception):
    """Base of all errors raised on purpose by graphplan."""


class BudgetError(GraphplanError, ValueError):
    """A budget that cannot be read: no unit, negative, zero, above 100 %, or not a number."""


class InfeasibleBudget(GraphplanError):
    """No plan fits the budget. `minimum_bytes` does; `binding_op` names the op that sets it."""

    def __init__(self, message: str, *, minimum_bytes: int, binding_op: str) -> None:
        super().__init__(message)
        self.minimum_bytes = minimum_bytes
        self.binding_op = binding_op

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the fields when the error crosses a process boundary."""
        return (_infeasible, (str(self), self.minimum_bytes, self.binding_op))


def _infeasible(message: str, minimum_bytes: int, binding_op: str) -> InfeasibleBudget:
    return InfeasibleBudget(message, minimum_bytes=minimum_bytes, binding_op=binding_op)


class CaptureError(GraphplanError):
    """The model cannot be captured as one graph; the message names the line of the model that prevents it."""


class UnsupportedModel(GraphplanError, TypeError):
    """The model has something that graphplan does not train: no trainable parameter, or sparse ones."""


class NoParts(UnsupportedModel):
    """A model that cannot be run on parts of a batch, one after the other, with the same result."""


class UnsupportedOptimizer(GraphplanError, TypeError):
    """The optimizer, its parameters or its state are something that a planned step cannot update."""


class StepFailed(GraphplanError, RuntimeError):
    """A planned step broke off after it had begun to write: the message says what is new and what is old."""


class PlanFormatError(GraphplanError, ValueError):
    """A plan file that cannot be read: truncated, not JSON, an unknown version, or a missing field."""


class PlanMismatch(GraphplanError, ValueError):
    """A plan that was made for another graph, or names an op that this graph does not have."""


class BackwardError(GraphplanError, RuntimeError):
    """Backward was called in a way that a planned step cannot serve (twice, or with create_graph)."""


class PromiseBroken(GraphplanError, AssertionError):
    """A check found a planned step that differs from the plain model, or a peak above the budget."""
