"""Planner: one plan and one program for each way in which a model is called, made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import nn

from graphplan.capture import Capture
from graphplan.choices import (
    Candidate,
    Candidates,
    at_budget,
    candidate_in_parts,
    choose,
    least_peaks,
    prepare_candidates,
)
from graphplan.device import Device
from graphplan.errors import GraphplanError
from graphplan.heap import Room
from graphplan.lift import Prepared
from graphplan.measure import LossFails
from graphplan.optimize import Options, Source, carry, check_fingerprint, check_plan, device_of
from graphplan.plan import Plan
from graphplan.progress import bars_or
from graphplan.replay import pick
from graphplan.units import parse_budget

P = TypeVar("P")
Sources = Callable[[], Source]


@dataclass(frozen=True, slots=True)
class Entry(Generic[P]):
    """One plan and the program that runs it."""

    prepared: Prepared
    plan: Plan
    step: P


class Planner(Generic[P]):
    """Keeps captured graphs and their plans by key; `build(captured, prepared, plan)` makes the program."""

    def __init__(self, options: Options, model: nn.Module, build: Callable[[Capture, Prepared, Plan], P]) -> None:
        """Begin with nothing captured."""
        self.options, self.model, self.build = options, model, build
        self.device: Device | None = options.device
        self.entries: dict[Hashable, Entry[P]] = {}
        self.latest: Entry[P] | None = None
        self._grounds: dict[Hashable, Candidates] = {}
        self._room = Room()
        self._samples = 0  # of the batch that the example's targets belong to

    def entry(self, key: Hashable, sources: Sources) -> Entry[P]:
        """Return the entry for `key`, planned now if it is new."""
        found = self.entries.get(key)  # asked for once: a key is a thousand entries, to be hashed at every call
        if found is None:
            found = self.entries[key] = self._make(key, sources)
        self.latest = found
        return found

    def entry_to_run(self, key: Hashable, sources: Sources) -> Entry[P]:
        """Return the entry for `key`, with room for what it will take."""
        found = self.entry(key, sources)
        if found.prepared.device.kind == "cpu":
            self._room.hold(found.plan.peak_bytes)
        return found

    def adopt(self, plan: Plan, key: Hashable, sources: Sources) -> None:
        """Run `plan`, made elsewhere, for calls with `key`; nothing is solved.

        Raises:
            PlanMismatch: the plan is for another graph, or does not fit its budget here.
        """
        with bars_or(self.options.report) as report, torch.enable_grad():
            options = replace(self.options, report=report, released=frozenset(plan.released))
            source, options = self._fitted(sources(), options)
            source = replace(source, batch=None)  # the noise of a plan made elsewhere was measured there
            candidates = self._candidates(key, source, options)
            if plan.parts > 1 and source.in_parts is not None:
                candidates = (candidate_in_parts(candidates[0], options, source, plan.parts),)
        mine = next((c for c in candidates if c.captured.graph.fingerprint == plan.fingerprint), candidates[0])
        check_fingerprint(plan, mine.captured.graph)
        self.latest = self._entry(mine, plan)
        self.entries[key] = self.latest
        self.options = replace(self.options, released=frozenset(plan.released))  # of other batches' graphs, too

    def least_peaks(self, key: Hashable, sources: Sources) -> tuple[int, ...]:
        """Return the least feasible peak of each form of what `sources` gives."""
        with torch.enable_grad():
            return least_peaks(self._candidates(key, sources(), self.options), self.options)

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
        self.device, self._grounds, self._samples = other.device, other._grounds, other._samples

    def copy_of(self, other: Planner[P]) -> None:
        """Take over everything, plans included: they hold no parameter."""
        self.share(other)
        self.latest, self.entries = other.latest, dict(other.entries)

    def _make(self, key: Hashable, sources: Sources) -> Entry[P]:
        with bars_or(self.options.report) as report, torch.enable_grad():
            source, options = self._fitted(sources(), replace(self.options, report=report))
            try:
                candidates = self._candidates(key, source, options)
            except LossFails:
                if not self._grounds:
                    raise
                # Targets of other lengths than the example's: the rule for an unknown loss is the next best.
                source, options = _without_loss(source), replace(options, loss_fn=None)
                candidates = self._candidates(key, source, options)
            for candidate in candidates:
                plan = None if self.latest is None else carry(self.latest.plan, candidate.prepared, options)
                if plan is not None:
                    return self._entry(candidate, plan)
            return self._entry(*choose(candidates, options, source))

    def _fitted(self, source: Source, options: Options) -> tuple[Source, Options]:
        """Return both with targets for as many samples as the batch has, made of the example's."""
        if options.example_targets is None or source.batch is None:
            return source, options
        size = source.batch.size
        self._samples = self._samples or size
        if size in (0, self._samples):
            return source, options
        targets = pick(options.example_targets, self._samples, torch.arange(size) % self._samples)
        batch = replace(source.batch, targets=targets)
        return replace(source, batch=batch), replace(options, example_targets=targets)

    def _entry(self, candidate: Candidate, plan: Plan) -> Entry[P]:
        check_plan(candidate.captured, candidate.prepared, plan)
        return Entry(candidate.prepared, plan, self.build(candidate.captured, candidate.prepared, plan))

    def _candidates(self, key: Hashable, source: Source, options: Options) -> Candidates:
        key = (key, source.batch is None, options.released)
        if key not in self._grounds:
            captured = source.captures()
            here = self.options.device or self._machine(device_of(self.model, captured[0]))
            noise = next((c.prepared.noise for cs in self._grounds.values() for c in cs if c.prepared.noise), None)
            self._grounds[key] = prepare_candidates(captured, options, here, source, noise)
        # A percentage is of the largest unplanned step so far: the smaller last batch has the room of the others.
        largest = max(cs[0].prepared.baseline_peak_bytes for cs in self._grounds.values())
        return at_budget(self._grounds[key], parse_budget(options.budget, largest))

    def _machine(self, like: torch.device) -> Device:
        """Return what was measured of this machine with as many threads as there are now."""
        if self.device is None or self.device.threads != torch.get_num_threads():
            self.device = Device.this(like)
        return self.device


def _without_loss(source: Source) -> Source:
    batch = source.batch
    return source if batch is None else replace(source, batch=replace(batch, loss_fn=None, targets=None))
