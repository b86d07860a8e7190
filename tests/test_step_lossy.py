"""Whole steps with lossy codes: what they add is measured on the step up to its gradients, and is in the updates."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lossy_cases import all_encoded, case, token_loss
from test_step import OPTIMIZERS
from torch import Tensor, nn

import graphplan
from graphplan.bare import noise_of_plans, with_noise_measured
from graphplan.choices import Candidate, Known, at_budget, candidates_of, choose, frontier, with_parts
from graphplan.lift import Prepared, lift, schedule_of
from graphplan.noise import REFUSED_PPB, gradient_variance
from graphplan.optimize import Options, Source, find_least, make_options
from graphplan.step import slices, slicing
from models_zoo import MODELS
from solvers import Solution, Status, simulate

LOSSES = {"conv": F.cross_entropy, "transformer": token_loss, "mlp": MODELS["mlp"].loss}


def batch_of(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model, inputs and targets."""
    if name != "mlp":
        return case(name)
    example = MODELS[name].example_small()
    assert example.targets is not None
    return MODELS[name].build_small(), example.inputs[0], example.targets


def encoded(candidate: Candidate, codec: str = "int8") -> graphplan.Plan:
    """Return the plan that has everything in this code, 8 bits, that may be."""
    prepared, noise = candidate.prepared, candidate.prepared.noise
    assert noise is not None
    index, fine = prepared.instructions.by_name(), {a for a in noise.rho if noise.ppb(a, codec) < REFUSED_PPB}
    schedule = tuple(index[s] for s in all_encoded(candidate.captured, prepared.instructions, codec, fine))
    peak = simulate(prepared.problem.with_budget(1 << 60), schedule).peak_bytes
    solution = Solution(Status.FEASIBLE, schedule, 0, "any plan", "test")
    made = lift(replace(prepared, problem=prepared.problem.with_budget(peak)), solution, peak)
    return replace(made, parts=candidate.parts)


def encoded_step(
    name: str, kind: str = "sgd", *, in_parts: bool = False, **more: Any
) -> tuple[graphplan.TrainStep, Tensor, Tensor]:
    """Return the step (on two parts of its batch) with everything in 8 bits, and a batch."""
    model, x, y = batch_of(name)
    optimizer = OPTIMIZERS[kind](model.parameters())
    made = {"codecs": "lossy", "time_limit": 1, **more}
    step = graphplan.train_step(model, LOSSES[name], optimizer, "100%", x, y, **made)
    options = replace(step.options, device=step.device_profile)  # measured already
    candidates = candidates_of(model, step.source(x, y), options)
    if in_parts:
        candidates = with_parts(candidates, options, step.source(x, y))[len(candidates) :]
    plan = encoded(candidates[0])
    assert plan.noise > 0
    return graphplan.apply(model, plan, x, None, LOSSES[name], y, optimizer=optimizer, **more), x, y


@pytest.mark.parametrize(("name", "kind"), [("conv", "momentum"), ("transformer", "adamw")])
def test_promises_hold(name: str, kind: str) -> None:
    model, x, y = batch_of(name)
    optimizer = OPTIMIZERS[kind](model.parameters())
    step = graphplan.train_step(model, LOSSES[name], optimizer, "65%", x, y, codecs="lossy", time_limit=3)
    report = graphplan.verify(step, model, x, example_targets=y)
    assert any(c.name == "gradient noise" for c in report.checks) == (step.plan.noise > 0)
    noise = step.entry().prepared.noise
    assert noise is not None
    assert noise.weights == ("adam" if kind == "adamw" else "sgd")
    losses = [float(step(x, y)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("name", "in_parts"), [("conv", False), ("transformer", False), ("mlp", True)])
def test_updates_differ_by_the_noise_that_was_measured(name: str, in_parts: bool) -> None:
    """Independent of the step up to its gradients: what SGD subtracts, with codes and without, read off parameters."""
    step, x, y = encoded_step(name, "sgd", in_parts=in_parts)
    bare = step.entry().step.capture.bare
    assert bare is not None
    batch = step.source(x, y).batch
    assert batch is not None
    (joint,) = noise_of_plans(step.entry().step.capture, step.entry().prepared, (step.plan,), batch, "sgd")
    variance = sum(gradient_variance(bare, batch).values())
    start = copy.deepcopy(step.model.state_dict())

    def change(number: int | None) -> list[Tensor]:
        step.model.load_state_dict(start)
        torch.manual_seed(5)
        if number is None:
            step.run_unplanned(x, y)
        else:
            step.step_number = number
            step(x, y)
        return [p.detach().double().clone() for p in step.model.parameters()]

    exact = change(None)
    added = [
        sum(float((a - b).square().sum()) for a, b in zip(exact, change(n), strict=True)) / 0.1**2 for n in range(6)
    ]
    found = sum(added) / len(added) / variance
    assert 0.6 < found / joint.noise < 1.6


def test_number_and_seed_alone_decide_the_rounding() -> None:
    step, x, y = encoded_step("conv")
    start = copy.deepcopy(step.model.state_dict())

    def after(number: int, seed: int) -> Tensor:
        step.model.load_state_dict(start)
        torch.manual_seed(seed)
        step.step_number = number
        step(x, y)
        assert step.step_number == number + 1
        return torch.cat([p.detach().flatten() for p in step.model.parameters()])

    assert torch.equal(after(3, 0), after(3, 0))
    assert not torch.equal(after(3, 0), after(4, 0))
    assert not torch.equal(after(3, 0), after(3, 1))


@pytest.mark.parametrize(
    "more", [{"clip_value": 0.01}, {"clip_norm": 0.1}, {"keep_grads": True}], ids=["value", "norm", "kept"]
)
def test_clipped_and_kept_gradients(more: dict[str, Any]) -> None:
    step, x, y = encoded_step("conv", **more)
    graphplan.verify(step, step.model, x, example_targets=y)


def test_a_saved_plan_rounds_alike_in_another_step(tmp_path: Path) -> None:
    step, x, y = encoded_step("transformer", "adamw")
    step.plan.save(tmp_path / "plan.json")
    other = copy.deepcopy(step.model)
    again = graphplan.apply(
        other, graphplan.Plan.load(tmp_path / "plan.json"), x, loss_fn=token_loss, example_targets=y,
        optimizer=OPTIMIZERS["adamw"](other.parameters()),
    )  # fmt: skip
    for _ in range(3):
        torch.manual_seed(1)
        ours = step(x, y)
        torch.manual_seed(1)
        assert torch.equal(ours, again(x, y))
    for a, b in zip(step.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_estimates_can_be_given() -> None:
    """Those of the model alone name the same activations; of what only the loss saves nothing is known, so it stays."""
    model, x, y = case("conv")
    noise = graphplan.estimate_noise(model, x, loss_fn=F.cross_entropy, example_targets=y)
    step = graphplan.train_step(
        model, F.cross_entropy, OPTIMIZERS["sgd"](model.parameters()), "55%", x, y, codecs="lossy", time_limit=3,
        noise=noise,
    )  # fmt: skip
    limited = step.entry().prepared.problem
    assert any(0 < op.noise_ppb < limited.noise_limit_ppb for op in limited.ops)
    assert step.entry().prepared.noise is noise
    graphplan.verify(step, model, x, example_targets=y)


def forms_of(name: str, **more: Any) -> tuple[graphplan.TrainStep, tuple[Candidate, ...], tuple[Any, Any]]:
    entry = MODELS[name]
    model, example = entry.build_small(), entry.example_small()
    batch = example.inputs, example.targets
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step = graphplan.train_step(model, entry.loss, optimizer, "100%", *batch, codecs="lossy", time_limit=2, **more)
    options = replace(step.options, device=step.device_profile)  # measured already
    return step, candidates_of(model, step.source(*batch), options), batch


@pytest.mark.parametrize("name", ["unet", "gpt", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_every_form_has_codes_and_keeps_its_promises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliced ops, losses in chunks, and gradients that never exist whole: their plans are measured up to gradients."""
    monkeypatch.setattr(slicing, "LEAST_BYTES", 1 << 10)
    monkeypatch.setattr(slices, "SLICE_BYTES", 1 << 12)
    step, candidates, (inputs, targets) = forms_of(name)
    assert len(candidates) > 1
    for c in candidates:
        assert c.prepared.noise is not None
        plan = encoded(c)
        assert plan.noise > 0
        batch = step.source(inputs, targets).batch
        assert batch is not None
        (joint,) = noise_of_plans(c.captured, c.prepared, (plan,), batch, "adam")
        assert 0.5 < joint.noise / plan.noise < 2
        optimizer = OPTIMIZERS["adamw"](step.model.parameters())
        ran = graphplan.apply(
            step.model, plan, inputs, loss_fn=MODELS[name].loss, example_targets=targets, optimizer=optimizer
        )
        graphplan.verify(ran, step.model, inputs, example_targets=targets)


def test_two_passes_and_parts_of_the_batch_round_too() -> None:
    """What the first pass reads of a code is what the second reads; each part of a batch has codes of its own."""
    step, candidates, (inputs, targets) = forms_of("mlp", clip_norm=1.0)
    two = [c for c in candidates if any(op.name.endswith("__norm") for op in c.captured.graph.ops)]
    assert two
    more = with_parts(candidates, step.options, step.source(inputs, targets))[len(candidates) :]
    assert more
    for c in (two[0], more[0]):
        plan = encoded(c)
        assert plan.noise > 0
        ran = graphplan.apply(
            step.model, plan, inputs, loss_fn=MODELS["mlp"].loss, example_targets=targets, optimizer=step.optimizer,
            clip_norm=1.0,
        )  # fmt: skip
        graphplan.verify(ran, step.model, inputs, example_targets=targets)


def where_codes_pay(understated: float) -> tuple[Candidate, Options, Source]:
    """Return a step that codes make no slower, its noise estimated too small, under a cap of 0.001."""
    model, x, y = case("conv")
    loss: dict[str, Any] = {"loss_fn": F.cross_entropy, "example_targets": y}
    estimates = graphplan.estimate_noise(model, x, **loss).times(understated)
    device = graphplan.optimize(model, "100%", x, codecs="lossy", noise=estimates, time_limit=2, **loss).device_profile
    codes = [k for k, s in device.samples.items() if s.target in ("encode", "decode") or s.target.endswith(":variant")]
    device.samples.update({k: replace(device.samples[k], cost_ns=1) for k in codes})
    options = make_options("100%", "lossy", 1e-3, time_limit=4, noise=estimates, device=device, **loss)
    source = Source.of(model, (x,), {}, options)
    (only,) = candidates_of(model, source, options)
    return only, options, source


@pytest.mark.parametrize("understated", [1.0, 1e-3])
def test_no_plan_of_a_frontier_breaks_the_cap(understated: float) -> None:
    """Estimates a thousand times too small let plans round far too much; each plan is measured, so it is noticed."""
    only, options, source = where_codes_pay(understated)
    plans = frontier((only,), options, 5, source.batch)
    rounding = [p for p in plans if p.noise]
    assert rounding
    assert all(p.noise_measured is not None and p.noise_measured <= 1e-3 for p in rounding)
    if understated < 1:
        blind = frontier((replace(only, known=Known()),), options, 5)
        assert all(p.noise_measured is None for p in blind if p.noise)
        assert source.batch is not None
        measured = noise_of_plans(only.captured, only.prepared, blind, source.batch, "sgd")
        assert max(j.noise for j in measured) > 1e-2


def test_a_least_plan_that_rounds_too_much_is_sought_again() -> None:
    """Estimates that grow make schedules invalid that were known: the one of the least peak may round, too."""
    only, options, source = where_codes_pay(1e-4)
    coarse = encoded(only, "int2")
    schedule = schedule_of(only.prepared, coarse.steps)
    only.known.least = Solution(Status.FEASIBLE, schedule, 0, "any plan", "test", least_peak_bytes=coarse.peak_bytes)
    plans = frontier((only,), options, 3, source.batch)
    assert plans
    assert all(p.noise_measured is not None and p.noise_measured <= 1e-3 for p in plans if p.noise)


def test_estimates_that_were_too_small_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next budget begins with those that held for the last one, and what was known by smaller ones is forgotten."""
    only, options, source = where_codes_pay(1e-2)
    top = only.prepared.baseline_peak_bytes
    measured: list[int] = []

    def counted(*arguments: Any) -> Any:
        measured.append(1)
        return with_noise_measured(*arguments)

    monkeypatch.setattr(sys.modules["graphplan.optimize"], "with_noise_measured", counted)
    _, first = choose(at_budget((only,), int(0.75 * top)), options, source)
    assert first.noise
    assert len(measured) > 1
    assert only.known.noise is not None
    measured.clear()
    _, second = choose(at_budget((only,), int(0.7 * top)), options, source)
    assert second.noise_measured is not None
    assert len(measured) == 1


def test_the_least_plan_is_sought_by_the_estimates_that_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for it: one by the first estimates, kept beside the larger ones, may round too much."""
    only, options, _ = where_codes_pay(1e-2)
    assert only.prepared.noise is not None
    larger, asked = only.prepared.noise.times(100), list[Any]()

    def seen(prepared: Prepared, options: Options) -> Solution:
        asked.append(prepared.noise)
        return find_least(prepared, options)

    monkeypatch.setattr(sys.modules["graphplan.choices"], "find_least", seen)
    only.known.learn(larger)
    only.least(options)
    assert asked == [larger]
