"""WholeProgram: a rewritten whole step bound to a model and an optimizer, run once a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphplan import functions
from graphplan.capture import Capture
from graphplan.errors import StepFailed
from graphplan.graph import Primal, StorageKind
from graphplan.lift import Prepared
from graphplan.plan import Plan
from graphplan.rewrite import KEY, rewrite_whole
from graphplan.runtime import bind, output_of
from graphplan.state import Find
from graphplan.step.optimizer import Slots


@dataclass(frozen=True, slots=True)
class WholeProgram:
    """One boxed module: parameters, buffers, inputs, optimizer state and settings in; loss and kept gradients out.

    `keyed`: it takes the key of lossy encodes after all these.
    """

    capture: Capture
    module: fx.GraphModule
    kept: tuple[int, ...]  # primals whose gradients the module returns
    values: tuple[Primal, ...]  # the tensors that the module takes: parameters, buffers, constants, inputs
    states: tuple[str, ...]  # the parameters whose optimizer state it takes
    places: tuple[int, ...]  # of each primal among the values, then the states, then the groups' settings
    keyed: bool = False

    @staticmethod
    def of(captured: Capture, prepared: Prepared, plan: Plan) -> WholeProgram:
        """Return the program that runs `plan`."""
        return WholeProgram.running(captured, rewrite_whole(captured.graph, prepared.instructions, plan.steps))

    @staticmethod
    def running(captured: Capture, module: fx.GraphModule) -> WholeProgram:
        """Return the program of a rewritten module."""
        kept = tuple(i for i, g in enumerate(captured.graph.gradients) if g is not None)
        primals = captured.graph.primals
        values = tuple(p for p in primals if p.kind not in (StorageKind.SETTINGS, StorageKind.STATE))
        states = tuple(p.path for p in primals if p.kind is StorageKind.STATE)
        value, state = iter(range(len(values))), iter(range(len(values), len(values) + len(states)))
        places = tuple(
            len(values) + len(states) + p.index
            if p.kind is StorageKind.SETTINGS
            else next(state if p.kind is StorageKind.STATE else value)
            for p in primals
        )
        keyed = any(n.name == KEY for n in module.graph.find_nodes(op="placeholder"))
        return WholeProgram(captured, module, kept, values, states, places, keyed)

    def run(self, find: Find, slots: Slots, tensors: Sequence[Tensor], number: int = 0) -> Tensor:
        """Run step `number` on the input `tensors` and return the loss; `find` finds the model's tensors.

        Raises:
            StepFailed: the step broke off after its first write. An error before that comes as it is, and nothing
                has changed.
        """
        graph = self.capture.graph
        values = [bind(p, find, tensors) for p in self.values]
        watched = [(p.path, v) for p, v in zip(self.values, values, strict=True) if p.kind in _CHANGED]
        versions = [v._version for _, v in watched]
        states = slots.states_of(self.states, dict(watched))
        for p, _ in states:
            p.grad = None
        given = [*values, *(own for _, own in states), *slots.optimizer.param_groups]
        bound = [given[place] for place in self.places]
        bound += [functions.mix(torch.initial_seed(), number)] if self.keyed else []
        try:
            with torch.no_grad(), torch._C._DisableAutocast():
                results = self.module(bound)
        except BaseException as e:
            changed = [name for (name, v), version in zip(watched, versions, strict=True) if v._version != version]
            _keep_states(slots, states)
            if not changed or not isinstance(e, Exception):
                raise
            raise StepFailed(_broken(e, changed, len(watched))) from e
        _keep_states(slots, states)
        count = len(graph.forward_outputs)
        for i, grad in zip(self.kept, results[count:], strict=True):
            values[self.places[i]].grad = grad
        loss: Tensor = output_of(graph.outputs[0], results[:count], ())
        return loss


_CHANGED = (StorageKind.PARAMETER, StorageKind.BUFFER)


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
