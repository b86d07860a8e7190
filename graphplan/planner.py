"""Planner: one plan and one program for each way in which a model is called, made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch
from torch import nn

from graphplan.capture import Capture
from graphplan.device import Device
from graphplan.errors import GraphplanError
from graphplan.lift import Prepared, schedule_of
from graphplan.optimize import (
    Options,
    Source,
    carry,
    check_fingerprint,
    check_noise,
    check_plan,
    device_of,
    find_least,
    make_plan,
    prepare,
)
from graphplan.plan import Plan
from graphplan.progress import bars
from graphplan.units import parse_budget
from solvers import Schedule, Solution

P = TypeVar("P")
Sources = Callable[[], Source]


@dataclass(frozen=True, slots=True)
class Entry(Generic[P]):
    """One plan and the program that runs it."""

    prepared: Prepared
    plan: Plan
    step: P


@dataclass(slots=True)
class _Ground:
    """What planning one graph needs, whatever the budget."""

    captured: Capture
    prepared: Prepared
    least: Solution | None = None
    schedules: list[Schedule] = field(default_factory=list)  # of plans made so far, at any budget


class Planner(Generic[P]):
    """Keeps captured graphs and their plans by key; `build(captured, prepared, plan)` makes the program."""

    def __init__(self, options: Options, model: nn.Module, build: Callable[[Capture, Prepared, Plan], P]) -> None:
        """Begin with nothing captured."""
        self.options, self.model, self.build = options, model, build
        self.device: Device | None = options.device
        self.entries: dict[Hashable, Entry[P]] = {}
        self.latest: Entry[P] | None = None
        self._grounds: dict[Hashable, _Ground] = {}

    def entry(self, key: Hashable, sources: Sources) -> Entry[P]:
        """Return the entry for `key`, planned now if it is new."""
        if key not in self.entries:
            self.entries[key] = self._make(key, sources)
        self.latest = self.entries[key]
        return self.latest

    def adopt(self, plan: Plan, key: Hashable, sources: Sources) -> None:
        """Run `plan`, made elsewhere, for calls with `key`; nothing is solved.

        Raises:
            PlanMismatch: the plan is for another graph, or does not fit its budget here.
        """
        with bars() as report, torch.enable_grad():
            source = replace(sources(), batch=None)  # the noise of a plan made elsewhere was measured there
            ground = self._ground(key, source, replace(self.options, report=report))
        check_fingerprint(plan, ground.captured.graph)
        self.latest = self._entry(ground.captured, ground.prepared, plan)
        self.entries[key] = self.latest

    def present(self) -> Entry[P]:
        """Return the latest entry.

        Raises:
            GraphplanError: there is none yet.
        """
        if self.latest is None:
            raise GraphplanError("no plan yet: pass example_inputs to optimize, or call the model on a training batch")
        return self.latest

    def profiled(self) -> Device:
        """Return what was measured of this machine.

        Raises:
            GraphplanError: nothing yet.
        """
        if self.device is None:
            raise GraphplanError("nothing is profiled yet: call the model on a training batch first")
        return self.device

    def share(self, other: Planner[P]) -> None:
        """Take over what `other` has captured and measured, not its plans."""
        self.device, self._grounds = other.device, other._grounds

    def copy_of(self, other: Planner[P]) -> None:
        """Take over everything, plans included: they hold no parameter."""
        self.share(other)
        self.latest, self.entries = other.latest, dict(other.entries)

    def _make(self, key: Hashable, sources: Sources) -> Entry[P]:
        with bars() as report, torch.enable_grad():
            options = replace(self.options, report=report)
            source = sources()
            ground = self._ground(key, source, options)
            prepared = ground.prepared
            known = self.latest.plan if self.latest is not None else None
            plan = carry(known, prepared, options) if known is not None else None
            if plan is None:
                ground.least = ground.least or find_least(prepared, options)
                plan = make_plan(prepared, ground.least, options, tuple(ground.schedules))
                prepared, plan = check_noise(ground.captured, prepared, plan, options, source.batch)
                ground.schedules.append(schedule_of(prepared, plan.steps))
            return self._entry(ground.captured, prepared, plan)

    def _entry(self, captured: Capture, prepared: Prepared, plan: Plan) -> Entry[P]:
        check_plan(captured, prepared, plan)
        return Entry(prepared, plan, self.build(captured, prepared, plan))

    def _ground(self, key: Hashable, source: Source, options: Options) -> _Ground:
        ground = self._grounds.get((key, source.batch is None))
        if ground is not None:  # captured for another budget
            problem = ground.prepared.problem
            budget = parse_budget(options.budget, ground.prepared.baseline_peak_bytes)
            prepared = replace(ground.prepared, problem=problem.with_budget(budget))
            return replace(ground, prepared=prepared)  # the list of schedules is shared
        captured = source.captures()
        self.device = self.device or Device.this(device_of(self.model, captured))
        noises = (g.prepared.noise for g in self._grounds.values())
        known = next((n for n in noises if n is not None), None)
        run = options.device is None
        prepared = prepare(captured, options, self.device, run=run, batch=source.batch, known=known)
        self._grounds[key, source.batch is None] = _Ground(captured, prepared)
        return self._grounds[key, source.batch is None]


def state_key(model: nn.Module) -> Hashable:
    """Return what of the model's state, and of autocast's, a captured graph depends on."""
    parameters = tuple((p.shape, p.dtype, p.device, p.requires_grad) for p in model.parameters())
    autocast = tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return (parameters, tuple(m.training for m in model.modules()), autocast)
