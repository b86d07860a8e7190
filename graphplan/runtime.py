"""Step: one planned training step as autograd sees it: two boxed halves inside one autograd.Function."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphplan import functions
from graphplan.capture import Capture
from graphplan.errors import BackwardError, PlanMismatch
from graphplan.graph import Graph, Output, Primal
from graphplan.release import take, unheld
from graphplan.rewrite import Rewritten
from graphplan.state import Find

SMALL_BYTES = 1024
_HELD = (
    "the gradient of an output ({} bytes) is held elsewhere, by a hook or by the loss, while the plan counts on its "
    "memory: plan with the loss_fn that you train with; what a hook keeps is beyond the budget"
)


class Awaited:
    """Lives as long as the values of one call that wait for its backward."""


@dataclass(frozen=True, slots=True)
class Step:
    """A rewritten graph and the structures around it: `run` is one call of the planned model."""

    capture: Capture
    rewritten: Rewritten
    tangents: tuple[Tensor | None, ...]  # for each forward output, as traced: no memory
    released: tuple[bool, ...]  # for each forward output: whether the plan counts on its gradient's memory
    reached: tuple[frozenset[int], ...]  # for each primal: the forward outputs whose gradients its own is made of

    @staticmethod
    def of(capture: Capture, rewritten: Rewritten, released: frozenset[str] = frozenset()) -> Step:
        """Return the step of a capture and its rewrite, which frees the `released` tangents at their last use."""
        nodes, tangents = capture.graph.nodes, capture.graph.tangents
        traced = tuple(None if t is None else nodes[t].meta["val"] for t in tangents)
        return Step(capture, rewritten, traced, tuple(t in released for t in tangents), reached(capture.graph))

    def key(self, number: int) -> tuple[int, ...]:
        """Return what the forward half takes beside the primals: for lossy encodes, the key of step `number`."""
        return (functions.mix(torch.initial_seed(), number),) if self.rewritten.keyed else ()

    def run(self, find: Find, tensors: Sequence[Tensor], number: int = 0, awaited: Awaited | None = None) -> Any:
        """Return what the model returns for input `tensors`, ready for one backward; until then `awaited` is held.

        `find` finds the model's tensors.
        """
        graph = self.capture.graph
        primals = [bind(p, find, tensors) for p in graph.primals]
        fresh = _Planned.apply(self, self.key(number), awaited, *primals)  # type: ignore[no-untyped-call]
        return self.capture.outputs.fill([output_of(o, fresh, primals) for o in graph.outputs])


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, step: Step, key: tuple[int, ...], awaited: Awaited | None, *primals: Tensor
    ) -> tuple[Tensor, ...]:
        with torch._C._DisableAutocast():
            results = step.rewritten.forward([*primals, *key])
        outputs, saved = results[: step.rewritten.outputs], results[step.rewritten.outputs :]
        del results
        tangents = step.capture.graph.tangents
        ctx.mark_non_differentiable(*(o for o, t in zip(outputs, tangents, strict=True) if t is None))
        ctx.save_for_backward(*saved)
        # Else autograd makes zeros also for outputs that have no gradient, beside what was planned.
        ctx.set_materialize_grads(False)
        ctx.step, ctx.awaited = step, awaited
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise BackwardError(
                "a planned step has no second derivative: backward(create_graph=True) needs the plain model"
            )
        alone = unheld(gradients) if any(ctx.step.released) else []
        unread = {i for i, g in enumerate(gradients) if g is None}
        arguments, held = _take_saved(ctx), []
        for i, traced in enumerate(ctx.step.tangents):
            gradient, release = gradients[i], ctx.step.released[i]
            if traced is None:
                continue
            if gradient is None:  # of an output that the loss does not read
                gradient = torch.zeros(traced.shape, dtype=traced.dtype, device=traced.device)
                held += [] if release else [gradient]  # as the plan has it
            elif release and alone[i]:
                gradient = take(gradient)
            elif release:
                _warn_of(gradient)
            arguments.append(like_traced(gradient, traced.stride()))
            del gradient
        with torch._C._DisableAutocast():
            results = ctx.step.rewritten.backward(arguments)
        return (None, None, None, *_of_what_was_read(results, ctx.step.reached, unread))


def reached(graph: Graph) -> tuple[frozenset[int], ...]:
    """Return for each primal the forward outputs whose gradients its own is made of; none without one."""
    found: dict[fx.Node, frozenset[int]] = {}
    own = {t: frozenset([i]) for i, t in enumerate(graph.tangents) if t is not None}
    for node in graph.module.graph.nodes:
        found[node] = own.get(node.name, frozenset().union(*(found[n] for n in node.all_input_nodes)))
    nodes = graph.nodes
    return tuple(frozenset() if g is None else found[nodes[g]] for g in graph.gradients)


def _of_what_was_read(
    results: Sequence[Tensor | None], reached: Sequence[frozenset[int]], unread: set[int]
) -> list[Tensor | None]:
    """Return None, as autograd does, for gradients of nothing but outputs that the loss did not read.

    An optimizer leaves such a parameter alone; one whose gradient is zero it decays, and moves by its momentum.
    """
    return [None if of and of <= unread else g for g, of in zip(results, reached, strict=True)]


def _warn_of(held: Tensor) -> None:
    nbytes = held.untyped_storage().nbytes()
    if nbytes > SMALL_BYTES:  # not a scalar that is shown as many
        warnings.warn(_HELD.format(nbytes), RuntimeWarning, stacklevel=3)


def _take_saved(ctx: Any) -> list[Tensor]:
    """Return the saved tensors; unless the caller asked to retain the graph, this list alone holds them."""
    try:
        saved = list(ctx.saved_tensors)
    except RuntimeError as e:
        if "second time" not in str(e):
            raise
        raise BackwardError(
            "backward was called a second time through one planned step: what it had saved is freed. Call the model "
            "again, or pass retain_graph=True to the first backward (its values then stay, beyond the budget)"
        ) from e
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.maybe_clear_saved_tensors()
        ctx.awaited = None
    return saved


def like_traced(grad: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return `grad` in the order of the strides that the backward was traced for, without their holes.

    A part of a tensor is traced with the strides of the whole, which would take the memory of the whole. What is dense
    can be viewed in every way in which that can.
    """
    if is_like_traced(grad, stride):
        return grad
    dense = _dense(grad.shape, stride)
    return torch.empty_strided(grad.shape, dense, dtype=grad.dtype, device=grad.device).copy_(grad)


def is_like_traced(grad: Tensor, stride: tuple[int, ...]) -> bool:
    """Return whether `grad` itself serves the backward that was traced for these strides."""
    dense = _dense(grad.shape, stride)
    return all(a == b for a, b, n in zip(grad.stride(), dense, grad.shape, strict=True) if n > 1)


def _dense(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense tensor whose dimensions have the same order, outer ones first where strides tie."""
    strides, step = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (stride[d], -d)):
        strides[d] = step
        step *= shape[d]
    return tuple(strides)


def bind(primal: Primal, find: Find, tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensor that stands for a graph input in this call; `find` is the model's `lookup`."""
    if primal.index >= 0:
        return tensors[primal.index]
    value = primal.value if primal.value is not None else find(primal.path)
    if value is None:
        raise PlanMismatch(f"the model has no tensor {primal.path!r} any more; it had one when it was captured")
    return value


def output_of(output: Output, fresh: Sequence[Tensor], primals: Sequence[Tensor]) -> Tensor:
    """Return one tensor that the model returns, from the forward half's results `fresh` and its inputs."""
    base = fresh[output.index] if output.source == "forward" else primals[output.index]
    if output.detached and base.requires_grad:
        base = base.detach()
    if output.view is None:
        return base
    size, stride, offset = output.view
    if base.is_contiguous() and offset == 0 and _contiguous(size) == stride and base.numel() == math.prod(size):
        return base.view(size)
    return base.as_strided(size, stride, base.storage_offset() + offset)


def _contiguous(size: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for s in reversed(size):
        strides.append(step)
        step *= s
    return tuple(reversed(strides))
