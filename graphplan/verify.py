"""verify: one planned step against the unplanned joint graph (to the bit) and the plain model (within rounding)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from graphplan.bare import noise_of_plans
from graphplan.errors import GraphplanError, PromiseBroken
from graphplan.measure import SCALARS_BYTES, default_loss, measure, preserved, trained_back, with_targets
from graphplan.noise import BIAS_LIMIT
from graphplan.plan import Plan
from graphplan.planned import PlannedModule
from graphplan.planner import Entry
from graphplan.replay import Batch
from graphplan.rewrite import rewrite
from graphplan.runtime import Step
from graphplan.state import lookup
from graphplan.step import TrainStep
from graphplan.step.program import WholeProgram
from graphplan.tree import Template, arguments
from graphplan.units import format_bytes


@dataclass(frozen=True, slots=True)
class Check:
    """One promise: what was compared, whether it held, and the figure."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` compared; `str()` is a line per promise."""

    checks: tuple[Check, ...]
    peak_bytes: int
    predicted_bytes: int

    @property
    def ok(self) -> bool:
        """Whether every promise held."""
        return all(c.ok for c in self.checks)

    def __str__(self) -> str:
        """Return one line per check."""
        return "\n".join(f"{'ok  ' if c.ok else 'FAIL'} {c.name}: {c.detail}" for c in self.checks)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Everything that one training step leaves behind, by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    rng: dict[str, Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)  # of a whole step, after its update
    state: dict[str, Tensor] = field(default_factory=dict)


def verify(
    planned: PlannedModule | TrainStep,
    model: nn.Module,
    example_inputs: Any,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    example_targets: Any = None,
) -> Report:
    """Check every promise on one training step of these inputs and return the Report.

    Outputs, gradients, buffers and the RNG stream must equal the unplanned joint graph's bit for bit, and the
    plain model's within rounding; the measured peak must be within the budget and 1 % of the prediction. Where the
    plan has lossy codes, what they add to the gradient of these inputs must be within its `gradient_noise` instead.
    Of a step of `train_step`, parameters and the optimizer's state after the update are compared too, unless it rounds.

    Raises:
        PromiseBroken: names the first thing that differs, with the figure.
    """
    if isinstance(planned, TrainStep):
        return _verify_whole(planned, model, example_inputs, example_targets)
    example_inputs, kwargs = arguments(example_inputs, example_kwargs)
    loss_of = with_targets(loss_fn or default_loss, example_targets)
    planned.prepare(*example_inputs, **kwargs)
    entry = planned.entry()
    capture, prepared = entry.step.capture, entry.prepared
    program = [prepared.instructions.items[i].name for i in prepared.instructions.program]
    unplanned = Step.of(capture, rewrite(capture.graph, prepared.instructions, program, in_place=False))
    tensors = Template.of((tuple(example_inputs), dict(sorted(kwargs.items()))))[1]

    def outcome(call: Callable[[], Any]) -> _Outcome:
        with preserved(model, (example_inputs, kwargs), tensors[0].device if tensors else torch.device("cpu")):
            return _step(model, tensors, call, loss_of)

    plain = outcome(lambda: model(*example_inputs, **kwargs))
    joint = outcome(lambda: unplanned.run(lookup(model), tensors))
    ours = outcome(lambda: planned(*example_inputs, **kwargs))
    lossy = entry.plan.noise > 0
    what = [f.name for f in fields(_Outcome) if not (lossy and f.name == "gradients")]
    checks = [
        *_compare("unplanned graph", joint, ours, what, exact=True),
        *_compare("plain model", plain, ours, what, exact=False),
    ]
    if lossy:
        batch = Batch(model, tensors, loss_fn, example_targets)
        checks.append(_noise_check(entry, batch, "sgd"))
    loss = loss_fn or default_loss
    measured = measure(
        planned, example_inputs, loss, example_kwargs=kwargs, example_targets=example_targets, runs=1
    ).peak_bytes
    return _report(checks, measured, entry.plan)


def _verify_whole(step: TrainStep, model: nn.Module, inputs: Any, targets: Any) -> Report:
    if model is not step.model:
        raise GraphplanError("a step belongs to the model it was made for: pass that one")
    plan = step.prepare(inputs, targets)
    device = next(model.parameters()).device

    def outcome(call: Callable[..., Tensor]) -> _Outcome:
        with trained_back(model, step.optimizer, (inputs, targets), device):
            loss = call(inputs, targets)
            names = {id(p): n for n, p in model.named_parameters()}
            states = ((names[id(p)], own) for p, own in step.optimizer.state.items())
            return _Outcome(
                outputs={"loss": loss},
                gradients={},
                buffers={n: b.clone() for n, b in model.named_buffers()},
                rng={"cpu": torch.get_rng_state()},
                parameters={n: p.detach().clone() for n, p in model.named_parameters()},
                state={f"{n}.{k}": v.clone() for n, own in states for k, v in own.items() if isinstance(v, Tensor)},
            )

    plain, joint, ours = outcome(step.run_plain), outcome(step.run_unplanned), outcome(step)
    what = [f.name for f in fields(_Outcome) if not (plan.noise > 0 and f.name in ("parameters", "state"))]
    checks = [
        *_compare("unplanned graph", joint, ours, what, exact=True),
        *_compare("plain loop", plain, ours, what, exact=False),
    ]
    if plan.noise > 0:
        batch = step.source(inputs, targets).batch
        assert batch is not None
        checks.append(_noise_check(step.entry(), batch, step.options.weights))
    return _report(checks, measure(step, inputs, example_targets=targets, runs=1).peak_bytes, plan)


def _report(checks: list[Check], measured: int, plan: Plan) -> Report:
    report = Report((*checks, *_peak_checks(measured, plan)), measured, plan.peak_bytes)
    if not report.ok:
        raise PromiseBroken(str(next(c for c in report.checks if not c.ok)) + "\n" + str(report))
    return report


def _step(
    model: nn.Module, tensors: Sequence[Tensor], call: Callable[[], Any], loss_of: Callable[[Any], Tensor]
) -> _Outcome:
    outputs = call()
    loss_of(outputs).backward()  # type: ignore[no-untyped-call]
    named: dict[str, Tensor] = dict(model.named_parameters())
    named.update({f"input {i}": t for i, t in enumerate(tensors) if t.is_leaf and t.requires_grad})
    return _Outcome(
        outputs={f"output {i}": t.detach().clone() for i, t in enumerate(Template.of(outputs)[1])},
        gradients={n: t.grad.clone() for n, t in named.items() if t.grad is not None},
        buffers={n: b.clone() for n, b in model.named_buffers()},
        rng={"cpu": torch.get_rng_state()},
    )


def _compare(other: str, expected: _Outcome, got: _Outcome, compared: Iterable[str], *, exact: bool) -> Iterator[Check]:
    for what in compared:
        a, b = getattr(expected, what), getattr(got, what)
        if not a and not b:
            continue
        wrong = _first_difference(a, b, exact=exact or what == "rng")
        how = "equal to the bit" if exact or what == "rng" else "equal within rounding"
        yield Check(f"{what} against the {other}", wrong is None, wrong or f"{len(a)} {how}")


def _first_difference(a: dict[str, Tensor], b: dict[str, Tensor], *, exact: bool) -> str | None:
    if a.keys() != b.keys():
        return f"{sorted(a.keys() ^ b.keys())[0]!r} is only on one side"
    largest = max((_magnitude(x) for x in a.values()), default=0.0)
    for name, x in a.items():
        y = b[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"{name!r} is {y.dtype}{tuple(y.shape)}, expected {x.dtype}{tuple(x.shape)}"
        same = torch.equal(x.nan_to_num(), y.nan_to_num()) and torch.equal(x.isnan(), y.isnan())
        if same or (not exact and _close(x, y, largest)):
            continue
        difference = (x.double() - y.double()).abs().max().item()
        return f"{name!r} differs by up to {difference:.3g}, where the largest is {x.double().abs().max().item():.3g}"
    return None


def _close(x: Tensor, y: Tensor, largest: float) -> bool:
    """Within rounding: relative to the tensor's own largest magnitude, or to the step's where terms cancelled."""
    if not x.is_floating_point():
        return False
    eps = torch.finfo(x.dtype).eps
    atol = eps * max(1e3 * _magnitude(x), 1e2 * largest)
    return bool(torch.allclose(x.double(), y.double(), rtol=1e3 * eps, atol=atol, equal_nan=True))


def _magnitude(x: Tensor) -> float:
    return float(x.double().abs().max()) if x.numel() and x.is_floating_point() else 0.0


def _noise_check(entry: Entry[Step] | Entry[WholeProgram], batch: Batch, weights: str) -> Check:
    plan = entry.plan
    (joint,) = noise_of_plans(entry.step.capture, entry.prepared, (plan,), batch, weights)
    shown = f"measured {joint.noise:.3g} of the gradient's variance, predicted {plan.noise:.3g}"
    ok = joint.noise <= plan.gradient_noise and joint.bias <= BIAS_LIMIT
    return Check("gradient noise", ok, f"{shown}, cap {plan.gradient_noise:g}; bias {joint.bias:.0%} of it")


def _peak_checks(measured: int, plan: Plan) -> Iterator[Check]:
    budget = plan.budget_bytes
    shown = f"measured {format_bytes(measured)} ({measured}), budget {format_bytes(budget)} ({budget})"
    yield Check("peak within the budget", measured <= budget, shown)
    # What is reserved for a loss that was not measured may stay unused.
    unused = 0 if plan.loss_measured else plan.outside_bytes + SCALARS_BYTES
    ok = 0.99 * plan.peak_bytes - unused <= measured <= 1.01 * plan.peak_bytes
    yield Check("predicted peak", ok, f"measured / predicted {measured / max(1, plan.peak_bytes):.4f}")
