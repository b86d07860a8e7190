"""Gradient clipping inside a step, as nodes of its graph: torch.nn.utils' own arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

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

    @property
    def on(self) -> bool:
        """Whether gradients are clipped at all."""
        return self.value is not None or self.norm is not None

    def apply(self, parameters: Iterable[Tensor]) -> None:
        """Clip the gradients of `parameters` in place, as a plain loop does."""
        if self.value is not None:
            torch.nn.utils.clip_grad_value_(parameters, self.value)
        elif self.norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.norm)


def clip_gradients(
    graph: fx.Graph,
    interface: Interface,
    updated: list[int],
    backward: set[fx.Node],
    clip: Clip,
    two_pass: bool = False,
) -> None:
    """Put the clipped gradients of the primals `updated` in place of the gradients.

    By value, each gradient is clipped where it is final. By norm, all of them wait for the last one's norm; with
    `two_pass` a backward before this one finds the norms, and each gradient is dropped at once, twice.
    """
    grads = {i: g for i in updated if (g := interface.gradients[i]) is not None}
    if clip.value is not None:
        for i, grad in grads.items():
            if grad.meta["val"].is_complex():
                path = interface.primals[i][0].path
                raise GraphplanError(f"clip_value: the gradient of {path!r} is complex and has no order; use clip_norm")
            grads[i] = _after(graph, grad, aten.clamp.default, (grad, -clip.value, clip.value), backward)
    elif clip.norm is not None and grads:
        measured = _repeat(graph, list(grads.values()), backward) if two_pass else list(grads.values())
        norms = [_after(graph, g, aten.linalg_vector_norm.default, (g,), backward) for g in measured]
        order = {n: t for t, n in enumerate(graph.nodes)}
        place = max(norms, key=order.__getitem__)
        factor = _after(graph, place, clip_factor, (norms, clip.norm), backward)
        for i, grad in grads.items():
            grads[i] = _after(graph, grad if two_pass else factor, aten.mul.Tensor, (grad, factor), backward)
    for i, grad in grads.items():
        interface.gradients[i] = grad


def _repeat(graph: fx.Graph, results: list[fx.Node], backward: set[fx.Node]) -> list[fx.Node]:
    """Copy what the backward does for `results` in front of it; return the copies of `results`."""
    needed: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node in backward and node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    originals = [n for n in graph.nodes if n in needed]
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(next(n for n in graph.nodes if n in backward)):
        for node in originals:
            new = graph.node_copy(node, lambda n: copies.get(n, n))
            new._rename(f"{node.name}__norm")
            args, kwargs = fx.node.map_arg((new.args, new.kwargs), lambda n: n.meta["val"])
            with detect_fake_mode(node.meta["val"]) or contextlib.nullcontext():
                new.meta["val"] = new.target(*args, **kwargs)  # type: ignore[operator]  # own storages, same views
            copies[node] = new
    backward.update(copies.values())
    return [copies[n] for n in results]


def clip_factor(norms: list[Tensor], bound: float) -> Tensor:
    """Return what all gradients are multiplied by, from their norms: as torch.nn.utils.clip_grad_norm_."""
    total = torch.linalg.vector_norm(torch.stack(norms))
    return torch.clamp(bound / (total + 1e-6), max=1.0)


def _after(
    graph: fx.Graph, place: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], backward: set[fx.Node]
) -> fx.Node:
    """Add a backward node behind `place`: an elementwise one, or one that yields a scalar."""
    with graph.inserting_after(place):
        node = graph.call_function(target, args)
    value = node.all_input_nodes[0].meta["val"]
    elementwise = target in (aten.clamp.default, aten.mul.Tensor)
    with detect_fake_mode(value) or contextlib.nullcontext():
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = torch.empty_like(value) if elementwise else target(*values)  # a complex one's norm is real
    backward.add(node)
    return node
