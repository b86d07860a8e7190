"""Execution, the client's side: local epochs of planned steps, under a cap that the operating system keeps."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from graphplan.cap import Cap, start_threads
from graphplan.capture import capture
from graphplan.choices import prepare_candidates, with_parts
from graphplan.codecs import choose_codecs
from graphplan.device import Device
from graphplan.errors import GraphplanError
from graphplan.federated.budget import Budget
from graphplan.federated.task import Task, task_loss, task_options
from graphplan.heap import tune_malloc
from graphplan.measure import measure, resident_bytes
from graphplan.optimize import prepare
from graphplan.plan import Plan
from graphplan.planned import PlannedModule
from graphplan.step import TrainStep
from graphplan.whole import WholeStep


class Refused(GraphplanError):
    """This client has not the memory for what it was asked; `needed_bytes` is the least that it knows of."""

    def __init__(self, message: str, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class Sized(Protocol):
    """A Plan or a Program."""

    @property
    def peak_bytes(self) -> int:
        """What its step takes."""


class Trains(Protocol):
    """What local training needs: the tensors, and a step for each plan."""

    @property
    def model(self) -> nn.Module:
        """Holds what is trained."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Updates it; whole steps are bound to it."""

    def program(self, order: Sized | None) -> nn.Module | WholeStep:
        """Return what runs a step; None is plain PyTorch."""

    def warm(self, order: Sized | None) -> None:
        """Run each op once, alone: what kernels set up for themselves then exists before a cap is set."""

    def peak(self, order: Sized | None) -> int:
        """Return the measured peak of one step in bytes."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a client is asked to train with. No plan: plain PyTorch, which takes `unplanned_bytes`.

    `plans` (or programs) are for one graph, by descending peak. `proximal_mu` pulls towards the received weights
    (FedProx), whose copy then takes memory beside the step.
    """

    plans: Sequence[Sized]
    unplanned_bytes: int
    learning_rate: float
    proximal_mu: float = 0.0
    capped: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What local training did. `measured_peak_bytes` is of the plan that ran last, by the allocator's meter."""

    steps: int
    loss: float
    squared_loss: float
    step_ns: int
    planned_peak_bytes: int
    measured_peak_bytes: int
    rss_growth_bytes: int
    moves: int


@dataclass(slots=True)
class Trainer:
    """One task in this process: its model, the programs made for plans, what they were measured to take."""

    task: Task
    device: Device | None = None
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    programs: dict[int, PlannedModule | TrainStep] = field(default_factory=dict)
    measured: dict[int, int] = field(default_factory=dict)
    warmed: bool = False
    bases: dict[tuple[tuple[str, ...], bool], PlannedModule | TrainStep] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take a copy of the task's model, to be filled with received weights."""
        self.model = self.task.fresh()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)

    def program(self, order: Sized | None) -> nn.Module | WholeStep:
        """Return the model executing a plan, checked against this graph, this machine and the plan's own budget.

        Raises:
            PlanMismatch: another graph, an op that it lacks, or more memory here than the budget.
        """
        if order is None:
            return self.model
        plan = cast(Plan, order)
        if _key(plan) not in self.programs:
            planned = self._planned(plan.budget_bytes, plan.codecs, bool(plan.update))
            planned.adopt(plan, *self._example(bool(plan.update)))
            self.programs[_key(plan)] = planned
        return self.programs[_key(plan)]

    def plan_here(self, budget_bytes: int, whole: bool) -> Plan:
        """Plan on this machine: the answer to a plan that is not for this graph.

        Raises:
            InfeasibleBudget: nothing fits.
        """
        planned = self._planned(budget_bytes, tuple(c.name for c in choose_codecs("exact")), whole)
        plan = planned.prepare(*self._example(whole))
        self.programs[_key(plan)] = planned
        return plan

    def warm(self, order: Sized | None) -> None:
        """Run each op once, alone, unless profiling has done so here; plain PyTorch's, too, where there is no plan."""
        profiled = order is not None and self.device is None  # by `program`
        if not self.warmed and not profiled:
            plan = None if order is None else cast(Plan, order)
            Trainer(self.task).profile((plan and plan.codecs) or "none", whole=bool(plan and plan.update))
        self.warmed = True

    def _example(self, whole: bool) -> tuple[Tensor, ...]:
        return self.task.example if whole else self.task.example[:1]

    def _planned(self, budget_bytes: int, codecs: tuple[str, ...], whole: bool) -> PlannedModule | TrainStep:
        key = codecs, whole
        if key in self.bases:  # captured and profiled already
            return self.bases[key].at_budget(budget_bytes)
        options = task_options(self.task, budget_bytes, codecs or "none", device=self.device)
        if whole:
            self.bases[key] = TrainStep(self.model, task_loss, self.optimizer, options)
        else:
            self.bases[key] = PlannedModule(self.model, options)
        return self.bases[key]

    def profile(self, codecs: str | Iterable[str] = "lossy", *, whole: bool = False, forms: bool = False) -> Device:
        """Return what this machine needs for each op of the task's step, with these codecs; measured once.

        With `forms` also for those of a whole step's other forms, and of parts of the batch.
        """
        if self.device is None:
            device = Device.this(self.task.example[0].device)
            measure_ops(self.task, device, codecs, whole=whole, forms=forms)
            self.device = device
        return self.device

    def peak(self, order: Sized | None) -> int:
        """Return the measured peak of one step in bytes, by the allocator's meter; each program is measured once."""
        key = 0 if order is None else _key(cast(Plan, order))
        if key not in self.measured:
            images, labels = self.task.example
            program = self.program(order)
            self.model.train()
            self.measured[key] = measure(program, (images,), task_loss, example_targets=labels, runs=1).peak_bytes
        return self.measured[key]


def measure_ops(
    task: Task, device: Device, codecs: str | Iterable[str], *, whole: bool = False, forms: bool = False
) -> None:
    """Measure the ops of a task's step that `device` does not hold yet; arguments as in `Trainer.profile`."""
    model, options = task.fresh(), task_options(task, "100%", codecs)
    if not whole:
        prepare(capture(model, task.example[:1]), options, device)
        return
    step = TrainStep(model, task_loss, torch.optim.SGD(model.parameters(), lr=1.0), options)
    source = replace(step.source(*task.example), batch=None)
    captured = source.captures() if forms else source.to_the_bit()
    candidates = prepare_candidates(captured, step.options, device, source)
    if forms:
        with_parts(candidates, step.options, source)


def train(trainer: Trains, batches: Sequence[tuple[Tensor, Tensor]], order: Order, budget: Budget) -> Outcome:
    """Train `trainer.model` on every batch; the budget is asked before each step, and a smaller one is obeyed.

    Raises:
        Refused: no plan that came along fits the budget, or the operating system gave no memory.
        PlanMismatch: a plan cannot be run here.
    """
    if order.capped:
        tune_malloc()
        start_threads()
    for group in trainer.optimizer.param_groups:
        group["lr"] = order.learning_rate
    run = _Run(trainer, order, budget)
    if order.proximal_mu:
        run.anchors = tuple(p.detach().clone() for p in trainer.model.parameters())
    before = _rss_mark()
    position = 0
    while position < len(batches):
        position = run.stretch(batches, position)
    assert run.losses
    return Outcome(
        steps=len(run.losses),
        loss=statistics.fmean(run.losses),
        squared_loss=statistics.fmean(x * x for x in run.losses),
        step_ns=int(statistics.median(run.times)),
        planned_peak_bytes=run.plan.peak_bytes if run.plan else order.unplanned_bytes,
        measured_peak_bytes=trainer.peak(run.plan),
        rss_growth_bytes=_rss_peak() - before,
        moves=run.moves,
    )


@dataclass(slots=True)
class _Run:
    """One client's local training, step by step."""

    trainer: Trains
    order: Order
    budget: Budget
    anchors: tuple[Tensor, ...] = ()
    plan: Sized | None = None
    moves: int = -1
    losses: list[float] = field(default_factory=list)
    times: list[int] = field(default_factory=list)

    def stretch(self, batches: Sequence[tuple[Tensor, Tensor]], position: int) -> int:
        """Take steps under one plan and one cap until the budget wants another; return the next position."""
        allowed = self.budget()
        plan = self.choose(allowed)
        if plan is not self.plan or self.moves < 0:
            self.plan, self.moves = plan, self.moves + 1
        program = self.trainer.program(plan)
        self.trainer.model.train()
        if self.order.capped:
            self.trainer.warm(plan)
        resident = resident_bytes(self.trainer.model, *batches[position])
        with Cap(allowed - resident) if self.order.capped else contextlib.nullcontext() as cap:
            while position < len(batches):
                self.step(program, batches[position])
                position += 1
                now = self.budget()
                if now != allowed:
                    if now < allowed or self.choose(now) is not plan:
                        break
                    allowed = now
        if cap is not None and cap.refusal is not None:
            raise Refused(f"the operating system gave no memory: {cap.refusal}", self.needed())
        return position

    def choose(self, allowed: int) -> Sized | None:
        """Return the fastest plan within `allowed` bytes; None is plain PyTorch."""
        if not self.order.plans:
            # Under a cap the operating system decides, and nobody's arithmetic.
            if self.order.capped or self.order.unplanned_bytes <= allowed:
                return None
        else:
            fitting = [p for p in self.order.plans if p.peak_bytes <= allowed]
            if fitting:
                return max(fitting, key=lambda p: p.peak_bytes)
        raise Refused(f"{self.needed()} bytes are needed; the budget is {allowed}", self.needed())

    def needed(self) -> int:
        """Return the least peak among what was ordered."""
        return min((p.peak_bytes for p in self.order.plans), default=self.order.unplanned_bytes)

    def step(self, program: nn.Module | WholeStep, batch: tuple[Tensor, Tensor]) -> None:
        """One step of gradient descent; the proximal pull is added to the gradients, in place."""
        start = time.perf_counter_ns()
        if isinstance(program, PlannedModule | TrainStep):
            program.step_number = len(self.losses)  # of this client's round, whatever this process ran before
        loss = program(*batch) if isinstance(program, WholeStep) else self.plain_step(program, *batch)
        self.losses.append(loss.item())
        self.times.append(time.perf_counter_ns() - start)

    def plain_step(self, program: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Forward, loss and backward, then the update."""
        loss = task_loss(program(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        for p, anchor in zip(self.trainer.model.parameters(), self.anchors, strict=False):
            assert p.grad is not None
            p.grad.add_(p.detach() - anchor, alpha=self.order.proximal_mu)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return loss.detach()


def _key(plan: Plan) -> int:
    return hash((plan.steps, plan.budget_bytes, plan.fingerprint))


def _status(name: str) -> int:
    line = next((s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(name)), "x 0")
    return int(line.split()[1]) * 1024


def _rss_mark() -> int:
    """Reset the high-water mark of resident memory (Linux) and return what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS:")
    except OSError:
        return 0


def _rss_peak() -> int:
    try:
        return _status("VmHWM:")
    except OSError:
        return 0
