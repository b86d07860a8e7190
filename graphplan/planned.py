"""PlannedModule: the model with the same parameters, signature and outputs, training inside a budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphplan.capture import Capture, call_key, capture, check_model, flatten_call
from graphplan.device import Device
from graphplan.errors import GraphplanError
from graphplan.lift import Prepared, schedule_of
from graphplan.noise import Noise
from graphplan.optimize import (
    Options,
    carry,
    check_fingerprint,
    check_noise,
    device_of,
    find_least,
    make_batch,
    make_options,
    make_plan,
    make_step,
    prepare,
)
from graphplan.plan import Plan
from graphplan.progress import bars
from graphplan.runtime import Step
from graphplan.tree import as_tuple
from graphplan.units import check_budget, parse_budget
from solvers import Schedule, Solution

_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@dataclass(frozen=True, slots=True)
class Entry:
    """One plan and the program that runs it."""

    prepared: Prepared
    plan: Plan
    step: Step


@dataclass(slots=True)
class _Ground:
    """What planning one graph needs, whatever the budget."""

    captured: Capture
    prepared: Prepared
    least: Solution | None = None
    schedules: list[Schedule] = field(default_factory=list)  # of plans made so far, at any budget


class PlannedModule(nn.Module):
    """What `optimize` returns. Training calls run the plan; evaluation and `no_grad` run the plain model.

    Parameters, buffers and submodules are the model's own, under the same names. One plan is kept for each
    combination of input shapes, dtypes, structure and training modes.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        """Wrap `model`, to be planned at its first training call or by `prepare`."""
        super().__init__()
        check_model(model)
        self.__dict__.update({name: getattr(model, name) for name in _SHARED})
        self.__dict__["_model"] = model
        self.training = model.training
        self._options = options
        self._device: Device | None = options.device
        self._entries: dict[Hashable, Entry] = {}
        self._grounds: dict[Hashable, _Ground] = {}
        self._latest: Entry | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model: planned while training with gradients, plain otherwise."""
        model = self._model
        if not (self.training and torch.is_grad_enabled()):
            return model(*args, **kwargs)
        template, tensors = flatten_call(args, kwargs)
        key = (call_key(template, tensors), self._state_key())
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = self._make_entry(key, args, kwargs)
        self._latest = entry
        return entry.step.run(model, tensors)

    def prepare(self, *args: Any, **kwargs: Any) -> Plan:
        """Plan for these example inputs now, without running the model; return the plan."""
        key = self._training_key(args, kwargs)
        if key not in self._entries:
            with torch.enable_grad():
                self._entries[key] = self._make_entry(key, args, kwargs)
        self._latest = self._entries[key]
        return self._latest.plan

    def adopt(self, plan: Plan, *args: Any, **kwargs: Any) -> None:
        """Execute `plan`, made elsewhere, for inputs like these; nothing is solved.

        Raises:
            PlanMismatch: the plan is for another graph, or does not fit its budget here.
        """
        key = self._training_key(args, kwargs)
        with bars() as report, torch.enable_grad():
            ground = self._ground(key, args, kwargs, replace(self._options, report=report), estimate=False)
        check_fingerprint(plan, ground.captured.graph)
        self._latest = Entry(ground.prepared, plan, make_step(ground.captured, ground.prepared, plan))
        self._entries[key] = self._latest

    def at_budget(self, budget: int | str) -> PlannedModule:
        """Return the same model planned for another budget, from what is already captured and measured."""
        check_budget(budget)
        new = PlannedModule(self._model, replace(self._options, budget=budget))
        new._device, new._grounds = self._device, self._grounds
        return new

    @property
    def plan(self) -> Plan:
        """The plan of the latest training call (or of the example inputs)."""
        return self.entry().plan

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten joint graph, to read: forward, then backward."""
        return self.entry().step.rewritten.joint

    @property
    def forward_module(self) -> fx.GraphModule:
        """The forward half as it runs; its `forward` takes one list and empties it."""
        return self.entry().step.rewritten.forward

    @property
    def backward_module(self) -> fx.GraphModule:
        """The backward half as it runs; its `forward` takes one list and empties it."""
        return self.entry().step.rewritten.backward

    @property
    def device_profile(self) -> Device:
        """What was measured of this machine so far; save it to plan for this machine elsewhere."""
        if self._device is None:
            raise GraphplanError("nothing is profiled yet: call the model on a training batch first")
        return self._device

    def train(self, mode: bool = True) -> PlannedModule:
        """Set training mode here and on the model."""
        super().train(mode)
        self._model.train(mode)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's own state dict."""
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load into the model."""
        return self._model.load_state_dict(state_dict, strict=strict, assign=assign)

    def __getattr__(self, name: str) -> Any:
        """Fall back to the model's own attributes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_model" not in self.__dict__:
                raise
            return getattr(self.__dict__["_model"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedModule:
        """Copy the model; share the plans, which hold no parameter."""
        new = PlannedModule(copy.deepcopy(self._model, memo), self._options)
        new._device, new._latest, new._grounds = self._device, self._latest, self._grounds
        new._entries = dict(self._entries)
        memo[id(self)] = new
        return new

    def entry(self) -> Entry:
        """Return the latest plan with what it was made from and the program that runs it."""
        if self._latest is None:
            raise GraphplanError("no plan yet: pass example_inputs to optimize, or call the model on a training batch")
        return self._latest

    def _training_key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
        if not self.training:
            raise GraphplanError("the model is in evaluation mode, which runs unplanned: call .train() first")
        template, tensors = flatten_call(args, kwargs)
        return (call_key(template, tensors), self._state_key())

    def _state_key(self) -> Hashable:
        """Return what of the model's state a captured graph depends on."""
        parameters = tuple((p.shape, p.dtype, p.device, p.requires_grad) for p in self.parameters())
        autocast = tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
        return (parameters, tuple(m.training for m in self.modules()), autocast)

    def _make_entry(self, key: Hashable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Entry:
        with bars() as report:
            options = replace(self._options, report=report)
            ground = self._ground(key, args, kwargs, options)
            prepared = ground.prepared
            known = self._latest.plan if self._latest is not None else None
            plan = carry(known, prepared, options) if known is not None else None
            if plan is None:
                ground.least = ground.least or find_least(prepared, options)
                plan = make_plan(prepared, ground.least, options, tuple(ground.schedules))
                batch = make_batch(self._model, flatten_call(args, kwargs)[1], options)
                prepared, plan = check_noise(ground.captured, prepared, plan, options, batch)
                ground.schedules.append(schedule_of(prepared, plan.steps))
            return Entry(prepared, plan, make_step(ground.captured, prepared, plan))

    def _ground(
        self, key: Hashable, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options, *, estimate: bool = True
    ) -> _Ground:
        ground = self._grounds.get((key, estimate))
        if ground is not None:  # captured for another budget
            problem = ground.prepared.problem
            budget = parse_budget(options.budget, ground.prepared.baseline_peak_bytes)
            prepared = replace(ground.prepared, problem=problem.with_budget(budget))
            return replace(ground, prepared=prepared)  # the list of schedules is shared
        captured = capture(self._model, args, kwargs)
        self._device = self._device or Device.this(device_of(self._model, captured))
        batch = make_batch(self._model, flatten_call(args, kwargs)[1], options) if estimate else None
        known = next((g.prepared.noise for g in self._grounds.values() if g.prepared.noise is not None), None)
        prepared = prepare(captured, options, self._device, run=options.device is None, batch=batch, known=known)
        self._grounds[key, estimate] = _Ground(captured, prepared)
        return self._grounds[key, estimate]


def optimize(
    model: nn.Module,
    budget: int | str,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    codecs: str | Iterable[str] = "exact",
    gradient_noise: float = 0.1,
    solver: str = "auto",
    time_limit: float = 30.0,
    device: Device | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    example_targets: Any = None,
    noise: Noise | None = None,
) -> PlannedModule:
    """Return `model` rewritten to train within `budget` bytes of tensor memory a step.

    Args:
        model: any module that autograd can train; it is not edited, its parameters are shared.
        budget: bytes, or text such as "512MiB", "1.5GB", "60%" (of the unplanned step's peak). It covers
            parameters, buffers, inputs, gradients, activations, every op's workspace and the caller's loss.
        example_inputs: one training batch, as a tuple; None: plan at the first training call.
        example_kwargs: keyword arguments that go with `example_inputs`.
        codecs: "none", "exact" (bit-identical gradients), "lossy" (rounded activations too, their noise estimated
            on the example batch and measured for the plan), or names from `graphplan.CODECS`.
        gradient_noise: the cap on what lossy codecs add to the gradient, as a share of the variance that it has
            over batches: 0.1 costs about as much as a batch a tenth smaller.
        solver: a name from `solvers.SOLVERS`.
        time_limit: seconds for solving.
        device: a saved Device to plan for; None measures this machine.
        loss_fn: what the caller computes on the outputs, so that its memory is reserved; without it, three
            times the outputs' bytes are.
        example_targets: second argument of `loss_fn`, if it takes one.
        noise: estimates made before (`graphplan.estimate_noise`); None estimates with this batch and `loss_fn`,
            which takes the memory of all activations and their gradients once.

    Raises:
        BudgetError: the budget cannot be read.
        InfeasibleBudget: no plan fits; `.minimum_bytes` would.
        UnsupportedModel, CaptureError: the model cannot be trained or captured; the message says where.
    """
    options = make_options(
        budget, codecs, gradient_noise, solver, time_limit, device, loss_fn, example_targets, noise=noise
    )
    planned = PlannedModule(model, options)
    if example_inputs is not None or example_kwargs is not None:
        planned.prepare(*as_tuple(example_inputs), **dict(example_kwargs or {}))
    return planned


def apply(
    model: nn.Module,
    plan: Plan,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    example_targets: Any = None,
    device: Device | None = None,
) -> PlannedModule:
    """Return `model` executing a plan that was made elsewhere for the same graph: no solving here.

    Each op's workspace is measured on this machine, or taken from a saved `device`.

    Raises:
        PlanMismatch: the plan is for another graph, names an op that this one lacks, or does not fit its own
            budget with this machine's workspaces.
    """
    if not isinstance(plan, Plan):
        raise GraphplanError(f"expected a graphplan.Plan, got {type(plan).__name__}; use Plan.load(path)")
    options = make_options(
        plan.budget_bytes, plan.codecs or "none", device=device, loss_fn=loss_fn, example_targets=example_targets
    )
    planned = PlannedModule(model, options)
    planned.adopt(plan, *as_tuple(example_inputs), **dict(example_kwargs or {}))
    return planned
