"""WholeProgram: a rewritten whole step bound to a model and an optimizer, run once a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphplan.capture import Capture
from graphplan.errors import StepFailed
from graphplan.graph import StorageKind
from graphplan.interface import lookup
from graphplan.lift import Prepared
from graphplan.plan import Plan
from graphplan.rewrite import rewrite_whole
from graphplan.runtime import bind, output_of
from graphplan.step.optimizer import Slots


@dataclass(frozen=True, slots=True)
class WholeProgram:
    """One boxed module: parameters, buffers, inputs, optimizer state and settings in; loss and kept gradients out."""

    capture: Capture
    module: fx.GraphModule
    kept: tuple[int, ...]  # primals whose gradients the module returns

    @staticmethod
    def of(captured: Capture, prepared: Prepared, plan: Plan) -> WholeProgram:
        """Return the program that runs `plan`."""
        return WholeProgram.running(captured, rewrite_whole(captured.graph, prepared.instructions, plan.steps))

    @staticmethod
    def running(captured: Capture, module: fx.GraphModule) -> WholeProgram:
        """Return the program of a rewritten module."""
        kept = tuple(i for i, g in enumerate(captured.graph.gradients) if g is not None)
        return WholeProgram(captured, module, kept)

    def run(self, model: nn.Module, slots: Slots, tensors: Sequence[Tensor]) -> Tensor:
        """Run one step on the input `tensors` and return the loss.

        Raises:
            StepFailed: the step broke off after its first write. An error before that comes as it is, and nothing
                has changed.
        """
        graph = self.capture.graph
        find = lookup(model)
        bound: list[Any] = []
        params: dict[str, Tensor] = {}
        states: list[tuple[Tensor, dict[str, Any]]] = []
        watched: list[tuple[str, Tensor, int]] = []
        for primal in graph.primals:
            if primal.kind is StorageKind.SETTINGS:
                bound.append(slots.optimizer.param_groups[primal.index])
            elif primal.kind is StorageKind.STATE:
                p = params[primal.path]
                own = slots.state_of(p, primal.path, slots.group_of[id(p)])
                states.append((p, own))
                bound.append(own)
            else:
                value = bind(primal, find, tensors)
                bound.append(value)
                if primal.kind is StorageKind.PARAMETER:
                    params[primal.path] = value
                if primal.kind in (StorageKind.PARAMETER, StorageKind.BUFFER):
                    watched.append((primal.path, value, value._version))
        for p, _ in states:
            p.grad = None
        try:
            with torch.no_grad(), torch._C._DisableAutocast():
                results = self.module(bound)
        except BaseException as e:
            changed = [name for name, t, version in watched if t._version != version]
            _keep_states(slots, states)
            if not changed or not isinstance(e, Exception):
                raise
            raise StepFailed(_broken(e, changed, len(watched))) from e
        _keep_states(slots, states)
        count = len(graph.forward_outputs)
        for i, grad in zip(self.kept, results[count:], strict=True):
            params[graph.primals[i].path].grad = grad
        loss: Tensor = output_of(graph.outputs[0], results[:count], ())
        return loss


def _keep_states(slots: Slots, states: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
    """Put what updates began into the optimizer; a parameter that was not updated has no new entry."""
    state = slots.optimizer.state
    for p, own in states:
        if own and state.get(p) is not own:  # where somebody looked, there is an empty one
            state[p] = own


def _broken(error: Exception, changed: list[str], total: int) -> str:
    return (
        f"the step broke off ({type(error).__name__}: {error}) after it had written {len(changed)} of {total} "
        f"parameters and buffers, {changed[0]!r} first. Those have their new values (and optimizer state), the others "
        "their old ones: updates run as soon as a gradient is final, and undoing them would need a copy of every "
        "parameter. Load the last saved state before going on"
    )
