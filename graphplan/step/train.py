"""train_step: the user's model, loss and optimizer as one planned program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from graphplan.capture import Capture, call_key, capture, check_model, flatten_call
from graphplan.device import Device
from graphplan.errors import GraphplanError, UnsupportedModel
from graphplan.measure import with_targets
from graphplan.noise import Noise
from graphplan.optimize import Options, Source, make_options
from graphplan.plan import Plan
from graphplan.planner import Entry, Planner
from graphplan.replay import Batch
from graphplan.rewrite import rewrite_whole
from graphplan.state import ModelState
from graphplan.step.clip import Clip
from graphplan.step.extend import Extension, Found, check_loss
from graphplan.step.optimizer import Slots, check_hooks, kept_parameters
from graphplan.step.parts import check_parts, in_parts
from graphplan.step.program import WholeProgram
from graphplan.tree import Template, arguments
from graphplan.units import check_budget
from graphplan.whole import WholeStep


class TrainStep(WholeStep):
    """What `train_step` returns: a call trains on one batch, inside the budget, and returns the loss.

    The model and the optimizer are the user's own objects: a learning-rate schedule, `state_dict()` and
    `load_state_dict()` of both work at any time between calls. One plan is kept for each combination of input
    shapes, training modes, parameter groups and kinds of settings. `step_number` counts the calls: with
    `torch.initial_seed()` it alone decides how lossy codes round.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        optimizer: Optimizer,
        options: Options,
        keep_grads: bool | Collection[str] = False,
        clip: Clip | None = None,
    ) -> None:
        """Check what can be checked; nothing is planned yet."""
        check_model(model)
        if any(p.requires_grad for p in _parameters(loss_fn)):
            raise UnsupportedModel("loss_fn has parameters that require grad: make it a part of the model")
        self.model, self.optimizer = model, optimizer
        self._loss_fn, self._clip = loss_fn, clip or Clip()
        self._kept = kept_parameters(model, keep_grads)
        self._slots = Slots.of(optimizer, model)
        self._options = replace(options, whole_step=True, weights=self._slots.rule.weights)
        self._shape = self._slots.shape()
        self._state = ModelState(model)
        self._planner: Planner[WholeProgram] = Planner(self._options, model, WholeProgram.of)
        self.step_number = 0

    def __call__(self, inputs: Any, targets: Any = None) -> Tensor:
        """Train on one batch, shaped like the examples; return the loss, detached."""
        call = self._call(inputs, targets)
        step = self._planner.entry_to_run(*call[:2]).step
        self.step_number += 1
        loss = step.run(self._state.find, self._slots, call[2], self.step_number - 1)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what learning-rate schedules look for
        return loss

    def prepare(self, inputs: Any, targets: Any = None) -> Plan:
        """Plan for batches like this one now, without training; return the plan."""
        return self._planner.entry(*self._call(inputs, targets)[:2]).plan

    def adopt(self, plan: Plan, inputs: Any, targets: Any = None) -> None:
        """Run `plan`, made elsewhere, for batches like this one; nothing is solved.

        Raises:
            PlanMismatch: the plan is for another graph, or does not fit its budget here.
        """
        self._planner.adopt(plan, *self._call(inputs, targets)[:2])

    def run_plain(self, inputs: Any, targets: Any = None) -> Tensor:
        """Do the same by PyTorch's own means, unplanned: what `verify` compares with."""
        args, kwargs = call_arguments(inputs, targets)
        parts = self._planner.latest.plan.parts if self._planner.latest is not None else 1
        self.optimizer.zero_grad()
        loss: Tensor = _WithLoss(self.model, self._loss_fn, parts)(*args, **kwargs)
        loss.backward()  # type: ignore[no-untyped-call]
        self._clip.apply(p for g in self.optimizer.param_groups for p in g["params"])
        self.optimizer.step()
        return loss.detach()

    def run_unplanned(self, inputs: Any, targets: Any = None) -> Tensor:
        """Run the captured graph with every op once and none in place: what `verify` demands the bits of."""
        self.prepare(inputs, targets)
        entry = self.entry()
        names = [entry.prepared.instructions.items[i].name for i in entry.prepared.instructions.program]
        captured = entry.step.capture
        module = rewrite_whole(captured.graph, entry.prepared.instructions, names, in_place=False)
        program = WholeProgram.running(captured, module)
        return program.run(self._state.find, self.slots(), self._call(inputs, targets)[2])

    def at_budget(self, budget: int | str) -> TrainStep:
        """Return the same step planned for another budget, from what is already captured and measured."""
        check_budget(budget)
        new = TrainStep(
            self.model, self._loss_fn, self.optimizer, replace(self._options, budget=budget), (), self._clip
        )
        new._kept = self._kept
        new._planner.share(self._planner)
        return new

    @property
    def plan(self) -> Plan:
        """The plan of the latest call (or of the example inputs)."""
        return self.entry().plan

    @property
    def graph_module(self) -> fx.GraphModule:
        """The whole step as it runs; its `forward` takes one list and empties it."""
        return self.entry().step.module

    @property
    def device_profile(self) -> Device:
        """What was measured of this machine so far; save it to plan for this machine elsewhere."""
        return self._planner.profiled()

    def entry(self) -> Entry[WholeProgram]:
        """Return the latest plan with what it was made from and the program that runs it."""
        return self._planner.present()

    def least_peaks(self, inputs: Any, targets: Any = None) -> tuple[int, ...]:
        """Return the least feasible peak of each form of the step: to the bit first, then in less memory."""
        return self._planner.least_peaks(*self._call(inputs, targets)[:2])

    @property
    def _rounds(self) -> bool:
        """Whether lossy codes may be used."""
        return any(not c.exact for c in self._options.codecs)

    @property
    def options(self) -> Options:
        """What was asked for, as the planning stages take it."""
        return self._options

    def source(self, inputs: Any, targets: Any = None) -> Source:
        """Return how to capture the step for batches like this one; nothing is planned or run."""
        return self._call(inputs, targets)[1]()

    def slots(self) -> Slots:
        """Return the optimizer's groups as they are now."""
        shape = self._slots.shape()
        if shape != self._shape:
            self._slots, self._shape = Slots.of(self.optimizer, self.model), shape
        return self._slots

    def _call(self, inputs: Any, targets: Any) -> tuple[Hashable, Callable[[], Source], list[Tensor]]:
        """Return (what calls share that one program serves, how to capture it, the input tensors)."""
        slots = self.slots()
        args, kwargs = call_arguments(inputs, targets)
        template, given = flatten_call(args, kwargs)
        tensors = [t.detach() for t in given]
        key = (call_key(template, tensors), self._state.read(self.model, self._loss_fn), self._shape)
        source = Source(
            lambda: self._capture(template, tensors, slots),
            Batch(self.model, tensors) if self._rounds else None,
            in_parts=lambda parts: self._capture_parts(template, tensors, slots, parts),
        )
        return key, lambda: source, tensors

    def _capture(self, template: Template, tensors: list[Tensor], slots: Slots) -> tuple[Capture, ...]:
        """Capture the step with every bit as plain PyTorch's, and in less memory, where only rounding differs.

        Where large ops work in slices, which is slower, the step without them comes first.
        """
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16:
                raise GraphplanError(
                    "float16 autocast needs a GradScaler, whose search for infinities must see every gradient before "
                    "the first update, while a planned step applies each as soon as it is final: use bfloat16"
                )
        check_hooks(self.model)
        args, kwargs = template.fill(tensors)
        with_loss = _WithLoss(self.model, self._loss_fn)
        start = Extension(self.model, slots, self._kept, self._clip)

        forms, sliced = [], False
        for exact in (True, False):
            for two_pass in (False, True) if self._clip.norm is not None else (False,):
                forms.append(self._captured(with_loss, args, kwargs, replace(start, exact=exact, two_pass=two_pass)))
            sliced = sliced or start.found.sliced
            if not start.found.inexact:
                break
        if sliced:
            whole = self._captured(with_loss, args, kwargs, replace(start, sliced=False))
            forms.insert(0, replace(whole, roomy=True))
        return tuple(forms)

    def _captured(
        self, with_loss: _WithLoss, args: Sequence[Any], kwargs: dict[str, Any], extension: Extension
    ) -> Capture:
        """Capture one form; where codes may round, up to its gradients, too."""
        made = capture(with_loss, args, kwargs, inner=self.model, extend=extension)
        if not self._rounds:
            return made
        bare = replace(extension, updates=False, found=Found())
        return replace(made, bare=capture(with_loss, args, kwargs, inner=self.model, extend=bare))

    def _capture_parts(self, template: Template, tensors: list[Tensor], slots: Slots, parts: int) -> Capture:
        """Capture the step with the model on parts of the batch.

        Raises:
            NoParts: that would be another step.
        """
        args, kwargs = template.fill(tensors)
        check_parts(self.model, args, {k: v for k, v in kwargs.items() if k != "targets"})
        with_loss = _WithLoss(self.model, self._loss_fn, parts)
        extension = Extension(self.model, slots, self._kept, self._clip, exact=False)
        return self._captured(with_loss, args, kwargs, extension)


class _WithLoss(nn.Module):
    """The model and its loss as one module; the model runs on `parts` of the batch."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor], parts: int = 1) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.parts = parts
        self.training = model.training

    def forward(self, *inputs: Any, targets: Any = None, **kwargs: Any) -> Tensor:
        whole = self.parts == 1
        outputs = self.model(*inputs, **kwargs) if whole else in_parts(self.model, self.parts, inputs, kwargs)
        return check_loss(with_targets(self.loss_fn, targets)(outputs))


def call_arguments(inputs: Any, targets: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a model with its loss: a mapping of inputs is keyword arguments."""
    args, kwargs = arguments(inputs)
    return args, {**kwargs, "targets": targets}


def _parameters(loss_fn: Any) -> Iterable[Tensor]:
    return loss_fn.parameters() if isinstance(loss_fn, nn.Module) else ()


def train_step(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    optimizer: Optimizer,
    budget: int | str,
    example_inputs: Any,
    example_targets: Any = None,
    *,
    keep_grads: bool | Collection[str] = False,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    codecs: str | Iterable[str] = "exact",
    gradient_noise: float = 0.1,
    solver: str = "auto",
    time_limit: float = 30.0,
    device: Device | None = None,
    noise: Noise | None = None,
) -> TrainStep:
    """Return forward, loss, backward and update of `model` as one program that runs within `budget` bytes.

    `loss = step(inputs, targets)` does what `zero_grad(); loss = loss_fn(model(*inputs), targets); loss.backward();
    optimizer.step()` does. Each gradient is applied and freed as soon as it is final.

    Args:
        model: any module that autograd can train; parameters and buffers are changed in place.
        loss_fn: `loss_fn(outputs, targets)` (`loss_fn(outputs)` when there are no targets), one scalar.
        optimizer: a torch.optim SGD, Adam or AdamW over parameters of the model.
        budget: bytes, or text such as "512MiB" or "60%" (of the unplanned step's peak); as in `optimize`, and
            the optimizer's state is in it.
        example_inputs: one batch: a tensor, a tuple of positional or a dict of keyword arguments.
        example_targets: what `loss_fn` gets beside the outputs, if anything.
        keep_grads: True, or names of parameters whose `.grad` is wanted after each step; they cost their bytes.
        clip_value: as torch.nn.utils.clip_grad_value_ before the update; costs no memory.
        clip_norm: as torch.nn.utils.clip_grad_norm_ over the updated parameters: every gradient waits for the last, or,
            where that does not fit, the backward runs twice, first for the norms alone.
        codecs, gradient_noise, solver, time_limit, device, noise: as in `optimize`; noise is weighed as the optimizer
            does.

    Raises:
        BudgetError: the budget cannot be read.
        InfeasibleBudget: no plan fits; `.minimum_bytes` would.
        UnsupportedModel, UnsupportedOptimizer, CaptureError: what cannot be planned; the message says where.
    """
    options = make_options(budget, codecs, gradient_noise, solver, time_limit, device, noise=noise)
    step = TrainStep(model, loss_fn, optimizer, options, keep_grads, Clip.of(clip_value, clip_norm))
    step.prepare(example_inputs, example_targets)
    return step


def apply_step(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    optimizer: Optimizer,
    plan: Plan,
    example_inputs: Any,
    example_targets: Any = None,
    *,
    keep_grads: bool | Collection[str] = False,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    device: Device | None = None,
) -> TrainStep:
    """Return the step that runs a plan made elsewhere for the same model, loss and optimizer: no solving here.

    Raises:
        PlanMismatch: the plan is for another graph, or does not fit its budget with this machine's workspaces.
    """
    options = make_options(plan.budget_bytes, plan.codecs or "none", device=device)
    step = TrainStep(model, loss_fn, optimizer, options, keep_grads, Clip.of(clip_value, clip_norm))
    step.adopt(plan, example_inputs, example_targets)
    return step
