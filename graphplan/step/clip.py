"""Gradient clipping inside a step, as nodes of its graph: torch.nn.utils' own arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphplan.errors import GraphplanError
from graphplan.interface import Interface

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Clip:
    """`value` bounds every element, `norm` the norm of all updated gradients together; None: not clipped."""

    value: float | None = None
    norm: float | None = None

    @staticmethod
    def of(value: float | None, norm: float | None) -> Clip:
        """Return the Clip, checked.

        Raises:
            GraphplanError: a bound that is not positive, or both at once.
        """
        for name, bound in (("clip_value", value), ("clip_norm", norm)):
            if bound is not None and not bound > 0:
                raise GraphplanError(f"{name} {bound!r} must be positive")
        if value is not None and norm is not None:
            raise GraphplanError("give clip_value or clip_norm, not both")
        return Clip(value, norm)

    def apply(self, parameters: Iterable[Tensor]) -> None:
        """Clip the gradients of `parameters` in place, as a plain loop does."""
        if self.value is not None:
            torch.nn.utils.clip_grad_value_(parameters, self.value)
        elif self.norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.norm)


def clip_gradients(
    graph: fx.Graph, interface: Interface, updated: list[int], backward: set[fx.Node], clip: Clip
) -> dict[int, fx.Node]:
    """Put the clipped gradients of the primals `updated` in place of the gradients; return them by primal.

    By value, each gradient is clipped where it is final. By norm, all of them wait for the last one's norm.
    """
    grads = {i: g for i in updated if (g := interface.gradients[i]) is not None}
    if clip.value is not None:
        for i, grad in grads.items():
            grads[i] = _after(graph, grad, aten.clamp.default, (grad, -clip.value, clip.value), backward)
    elif clip.norm is not None and grads:
        norms = [_after(graph, g, aten.linalg_vector_norm.default, (g,), backward) for g in grads.values()]
        order = {n: t for t, n in enumerate(graph.nodes)}
        place = max(norms, key=order.__getitem__)
        factor = _after(graph, place, clip_factor, (norms, clip.norm), backward)
        for i, grad in grads.items():
            grads[i] = _after(graph, factor, aten.mul.Tensor, (grad, factor), backward)
    for i, grad in grads.items():
        interface.gradients[i] = grad
    return grads


def clip_factor(norms: list[Tensor], bound: float) -> Tensor:
    """Return what all gradients are multiplied by, from their norms: as torch.nn.utils.clip_grad_norm_."""
    total = torch.linalg.vector_norm(torch.stack(norms))
    return torch.clamp(bound / (total + 1e-6), max=1.0)


def _after(
    graph: fx.Graph, place: fx.Node, target: object, args: tuple[object, ...], backward: set[fx.Node]
) -> fx.Node:
    """Add a backward node behind `place`: an elementwise one, or one that yields a scalar."""
    with graph.inserting_after(place):
        node = graph.call_function(target, args)  # type: ignore[arg-type]
    value = node.all_input_nodes[0].meta["val"]
    elementwise = target in (aten.clamp.default, aten.mul.Tensor)
    node.meta["val"] = torch.empty_like(value) if elementwise else value.new_empty(())
    backward.add(node)
    return node
