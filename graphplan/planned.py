"""PlannedModule: the model with the same parameters, signature and outputs, training inside a budget."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, update_wrapper
from typing import Any, overload

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from graphplan.capture import Capture, call_key, check_model, flatten_call
from graphplan.device import Device
from graphplan.errors import GraphplanError, PlanMismatch
from graphplan.lift import Prepared
from graphplan.noise import Noise
from graphplan.optimize import Options, Source, make_options
from graphplan.plan import Plan
from graphplan.planner import Entry, Planner
from graphplan.rewrite import rewrite
from graphplan.runtime import Awaited, Step
from graphplan.state import ModelState
from graphplan.step import TrainStep, apply_step
from graphplan.tree import arguments
from graphplan.units import check_budget

_TWO_CALLS = (
    "the planned module is called again while values of its last call wait for their backward: each call is within the "
    "budget, the two together are not. Plan a module that makes both calls, run backward between them, or use "
    "torch.no_grad() where no gradient is needed"
)
_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class _Forward:
    """`forward` under the wrapped model's signature, from which training loops read which inputs to pass."""

    def __get__(self, planned: PlannedModule | None, owner: type | None = None) -> Callable[..., Any]:
        if planned is None:
            return PlannedModule._call
        return update_wrapper(partial(planned._call), planned._model.forward)


class PlannedModule(nn.Module):
    """What `optimize` returns. Training calls run the plan; evaluation and `no_grad` run the plain model.

    Parameters, buffers and submodules are the model's own, under the same names. One plan is kept for each
    combination of input shapes, dtypes, structure and training modes. `step_number` counts the planned calls: with
    `torch.initial_seed()` it alone decides how lossy codes round, so that whoever sets both has the same bits again.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        """Wrap `model`, to be planned at its first training call or by `prepare`."""
        super().__init__()
        check_model(model)
        self.__dict__.update({name: getattr(model, name) for name in _SHARED})
        self.__dict__["_model"] = model
        self.training = model.training
        self._options = options
        self._planner = Planner(options, model, _build)
        self._state = ModelState(model)
        self.step_number = 0
        self._awaited: Callable[[], Awaited | None] = lambda: None

    forward = _Forward()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model: planned while training with gradients, plain otherwise."""
        model = self._model
        if not (self.training and torch.is_grad_enabled()):
            return model(*args, **kwargs)
        template, tensors = flatten_call(args, kwargs)
        key = (call_key(template, tensors), self._state.read(self._model))
        step = self._planner.entry_to_run(key, lambda: self._source(args, kwargs)).step
        self.step_number += 1
        if self._awaited() is not None:
            warnings.warn(_TWO_CALLS, RuntimeWarning, stacklevel=2)
        awaited = Awaited()
        self._awaited = weakref.ref(awaited)
        return step.run(self._state.find, tensors, self.step_number - 1, awaited)

    def prepare(self, *args: Any, **kwargs: Any) -> Plan:
        """Plan for these example inputs now, without running the model; return the plan."""
        return self._planner.entry(self._training_key(args, kwargs), lambda: self._source(args, kwargs)).plan

    def adopt(self, plan: Plan, *args: Any, **kwargs: Any) -> None:
        """Execute `plan`, made elsewhere, for inputs like these; nothing is solved.

        Raises:
            PlanMismatch: the plan is for another graph, or does not fit its budget here.
        """
        self._planner.adopt(plan, self._training_key(args, kwargs), lambda: self._source(args, kwargs))

    def at_budget(self, budget: int | str) -> PlannedModule:
        """Return the same model planned for another budget, from what is already captured and measured."""
        check_budget(budget)
        new = PlannedModule(self._model, replace(self._options, budget=budget))
        new._planner.share(self._planner)
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
        return self._planner.profiled()

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
        new._planner.copy_of(self._planner)
        new.step_number = self.step_number
        memo[id(self)] = new
        return new

    def __reduce__(self) -> tuple[Callable[..., PlannedModule], tuple[Any, ...]]:
        """Pickle the model and what was asked for: the plan is made anew where it is loaded, at the first call."""
        o = self._options
        asked = (o.codec_names or "none", o.gradient_noise, o.solver, o.time_limit, o.device)
        return optimize, (self._model, o.budget, None, None, *asked, o.loss_fn, o.example_targets, o.noise)

    def entry(self) -> Entry[Step]:
        """Return the latest plan with what it was made from and the program that runs it."""
        return self._planner.present()

    @property
    def _entries(self) -> dict[Hashable, Entry[Step]]:
        return self._planner.entries

    def _source(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Source:
        return Source.of(self._model, args, kwargs, self._options)

    def _training_key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
        if not self.training:
            raise GraphplanError("the model is in evaluation mode, which runs unplanned: call .train() first")
        template, tensors = flatten_call(args, kwargs)
        return (call_key(template, tensors), self._state.read(self._model))


def _build(captured: Capture, prepared: Prepared, plan: Plan) -> Step:
    instructions = prepared.instructions
    return Step.of(captured, rewrite(captured.graph, instructions, plan.steps), instructions.released)


def optimize(
    model: nn.Module,
    budget: int | str,
    example_inputs: Any = None,
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
        budget: bytes, or text such as "512MiB", "1.5GB", "60%" (of the unplanned step's peak; with batches of
            several sizes, of the largest so far). It covers parameters, buffers, inputs, gradients, activations,
            every op's workspace and the caller's loss.
        example_inputs: one training batch: a tensor, a tuple, or a mapping of keyword arguments; None: plan at the
            first training call.
        example_kwargs: keyword arguments that go with `example_inputs`.
        codecs: "none", "exact" (bit-identical gradients), "lossy" (rounded activations too, their noise estimated
            on the example batch and measured for the plan), or names from `graphplan.CODECS`.
        gradient_noise: the cap on what lossy codecs add to the gradient, as a share of the variance that it has
            over batches: 0.1 costs about as much as a batch a tenth smaller.
        solver: a name from `solvers.SOLVERS`.
        time_limit: seconds for solving; two to three times as many with codecs, where no plan is proven best.
        device: a saved Device to plan for; None measures this machine.
        loss_fn: what the caller computes on the outputs, so that its memory is reserved; without it, three
            times the outputs' bytes are.
        example_targets: second argument of `loss_fn`, if it takes one; for batches of other sizes, samples of it.
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
        args, kwargs = arguments(example_inputs, example_kwargs)
        planned.prepare(*args, **kwargs)
    return planned


@overload
def apply(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    example_targets: Any = None,
    device: Device | None = None,
    optimizer: None = None,
) -> PlannedModule: ...


@overload
def apply(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    example_kwargs: None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    example_targets: Any = None,
    device: Device | None = None,
    *,
    optimizer: Optimizer,
    **step_options: Any,
) -> TrainStep: ...


def apply(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    example_targets: Any = None,
    device: Device | None = None,
    optimizer: Optimizer | None = None,
    **step_options: Any,
) -> PlannedModule | TrainStep:
    """Return `model` executing a plan that was made elsewhere for the same graph: no solving here.

    Each op's workspace is measured on this machine, or taken from a saved `device`. A plan of `train_step` needs
    its `loss_fn` and an `optimizer` like the one that it was made for, and gives a TrainStep; `step_options` are then
    `keep_grads`, `clip_value` and `clip_norm`, as there.

    Raises:
        PlanMismatch: the plan is for another graph, names an op that this one lacks, or does not fit its own
            budget with this machine's workspaces.
    """
    if not isinstance(plan, Plan):
        raise GraphplanError(f"expected a graphplan.Plan, got {type(plan).__name__}; use Plan.load(path)")
    if plan.update and (optimizer is None or loss_fn is None):
        raise PlanMismatch(f"the plan is of a whole step with {plan.update}: pass loss_fn= and optimizer=")
    if optimizer is not None and not plan.update:
        raise PlanMismatch("the plan is of forward and backward only: leave optimizer= away, or plan with train_step")
    if optimizer is not None and loss_fn is not None:
        inputs = example_inputs if example_kwargs is None else dict(example_kwargs)
        return apply_step(model, loss_fn, optimizer, plan, inputs, example_targets, device=device, **step_options)
    options = make_options(
        plan.budget_bytes, plan.codecs or "none", device=device, loss_fn=loss_fn, example_targets=example_targets
    )
    planned = PlannedModule(model, options)
    args, kwargs = arguments(example_inputs, example_kwargs)
    planned.adopt(plan, *args, **kwargs)
    return planned
