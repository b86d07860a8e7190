"""Lossy codecs end to end: what reads them, what they add to the gradient, and what a plan says about it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphplan
import solvers
from graphplan.capture import capture
from graphplan.codecs import CODECS
from graphplan.codecs.lossy import DECIDES, Lossy
from graphplan.codecs.mixed import Mixed
from graphplan.functions import group, group_kernels
from graphplan.lower import computing_once
from graphplan.noise import REFUSED_PPB, Noise, NoiseFormatError, estimate, gradient_variance, measure_noise
from graphplan.optimize import find_least, make_options, make_plan
from graphplan.replay import Batch, Tape
from graphplan.rewrite import rewrite
from models_zoo import MODELS
from tests.lossy_cases import (
    all_encoded,
    case,
    gradients,
    offered,
    token_loss,
)

LOSSY = [name for name, codec in CODECS.items() if not codec.exact]
OFFERED = {  # images have no GELU, sequences no convolution
    "conv": [name for name in LOSSY if isinstance(CODECS[name], Lossy)],
    "transformer": [name for name in LOSSY if not isinstance(CODECS[name], Mixed)],
}


@pytest.mark.parametrize("name", ["conv", "transformer"])
def test_only_backward_ops_read_a_code(name: str) -> None:
    """A decoded value is no value of the Problem: nothing can be recomputed from it, nothing decided by it."""
    model, x, _ = case(name)
    captured, instructions = offered(model, x)
    codes = {e.id for e in instructions.encoded if e.lossy}
    readers = [i for i in instructions.items if codes & set(i.reads)]
    assert len(readers) >= 4 * len(OFFERED[name]) - 4
    for item in readers:
        assert item.kind == "variant"
        assert item.op is not None
        op = captured.graph.ops[item.op]
        assert op.backward
        assert op.node.target not in DECIDES
    assert not any(codes & set(i.writes) for i in instructions.items if i.kind != "encode")
    made = {e.codec for e in instructions.encoded if e.lossy}
    assert made == set(OFFERED[name])


@pytest.mark.parametrize(("name", "codec"), [(name, codec) for name in OFFERED for codec in OFFERED[name]])
def test_a_step_from_codes(name: str, codec: str) -> None:
    """Outputs are exact; gradients are near, the nearer the more bits; a step has its own rounding."""
    model, x, _ = case(name)
    captured, instructions = offered(model, x)
    program = [instructions.items[p].name for p in instructions.program]
    plain_y, plain = gradients(captured, instructions, program, model, x)
    steps = all_encoded(captured, instructions, codec)
    y, noisy = gradients(captured, instructions, steps, model, x)
    assert torch.equal(plain_y, y)
    off = math.sqrt(sum(float((noisy[n] - g).square().sum()) for n, g in plain.items()))
    off /= math.sqrt(sum(float(g.square().sum()) for g in plain.values()))
    limits = {"bf16": 0.02, "int8": 0.02, "int4": 0.25, "int2": 1.0, "mixed3": 0.8, "fewbit4": 0.1, "fewbit2": 0.5}
    assert 0 < off < limits[codec], off


def test_the_mask_of_a_relu_is_exact() -> None:
    """With the ReLU's own output in two bits, what flows back through it is what it was, to the bit."""
    model, x, _ = case("conv")
    captured, instructions = offered(model, x)
    program = [instructions.items[p].name for p in instructions.program]
    _, plain = gradients(captured, instructions, program, model, x)
    steps = all_encoded(captured, instructions, "int2", only={"relu_1"})
    assert any("from_int2_mask" in s for s in steps)
    _, noisy = gradients(captured, instructions, steps, model, x)
    wrong = {n for n, g in plain.items() if not torch.equal(g, noisy[n])}
    assert wrong == {"6.weight"}  # of the convolution that reads it


def test_noise_of_a_linear_layer_is_the_closed_form() -> None:
    """V = sum over samples of ||dY_n||^2 times the variances of row n's errors, s^2 f (1 - f) each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 6))
    x, y = torch.randn(64, 8), torch.randint(6, (64,))
    captured, instructions = offered(model, x, ["int4"])
    # tanh's own backward reads its output, too: leave only the linear layer's reader
    batch = Batch(model, [x], F.cross_entropy, y)
    tape = Tape(captured, batch, keep=True)
    hidden = torch.tanh(model[0](x)).detach()
    logits = model[2](hidden).detach().requires_grad_()
    (dy,) = torch.autograd.grad(F.cross_entropy(logits, y), logits)
    groups = hidden.view(64, 2, 256)
    low, high = groups.aminmax(dim=2, keepdim=True)
    step = (high - low) / 15
    at = (groups - low) / step
    variance = (step.square() * (at - at.floor()) * (1 - at + at.floor())).sum(dim=(1, 2))
    expected = float((dy.square().sum(dim=1) * variance).sum())
    found = []
    for key in range(40):
        code = torch.ops.graphplan.quantise(hidden, 4, key, 0)
        back = torch.ops.graphplan.dequantise(code, 4, hidden.shape, hidden.stride(), hidden.dtype)
        found.append(float((dy.t() @ (back - hidden)).square().sum()))
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.05)
    noise = estimate(captured, instructions, batch)
    rho = noise.rho["tanh"]["int4"] * sum(gradient_variance(captured, batch).values())
    steps = rewrite(captured.graph, instructions, all_encoded(captured, instructions, "int4", only={"tanh"}))
    joint = measure_noise(captured, steps, batch).noise * noise.gradient_variance
    assert rho == pytest.approx(joint, rel=0.35)
    assert rho > 0.9 * expected
    assert set(tape.gradients) == {n for n, _ in model.named_parameters()}


def test_the_tape_is_autograd_s() -> None:
    for name in ("conv", "transformer"):
        model, x, targets = case(name)
        if name == "transformer":
            model.eval()
            model[0].train()  # no dropout: two runs would draw two masks
        captured = capture(model, (x,), {})
        before = {n: b.clone() for n, b in model.named_buffers()}
        tape = Tape(captured, Batch(model, [x], token_loss, targets), keep=False)
        assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
        token_loss(model(x), targets).backward()
        for n, p in model.named_parameters():
            assert p.grad is not None
            assert torch.allclose(tape.gradient(n), p.grad, rtol=1e-3, atol=1e-6), n


def test_gradient_variance_is_that_over_batches() -> None:
    """Against the variance of the mean over many batches drawn from one distribution."""
    torch.manual_seed(0)
    model = nn.Linear(20, 3)

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn(32, 20), torch.randint(3, (32,))

    captured = capture(model, (draw()[0],), {})
    squares, found = [], []
    for _ in range(200):
        x, y = draw()
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), tuple(model.parameters()))
        squares.append(torch.cat([g.flatten() for g in grads]))
        found.append(sum(gradient_variance(captured, Batch(model, [x], F.cross_entropy, y)).values()))
    true = float(torch.stack(squares).var(dim=0).sum())
    assert sum(found) / len(found) == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("name", ["conv", "transformer"])
def test_noise_adds_up(name: str) -> None:
    model, x, targets = case(name)
    captured, instructions = offered(model, x)
    batch = Batch(model, [x], token_loss, targets)
    noise = estimate(captured, instructions, batch)
    for codec in ("int8", "int4"):
        steps = all_encoded(captured, instructions, codec)
        used = {s.removesuffix(f"__{codec}") for s in steps if s.endswith(f"__{codec}")}
        # An op that reads two codes runs from one of them here.
        predicted = sum(noise.rho[a][codec] for a in used)
        measured = measure_noise(captured, rewrite(captured.graph, instructions, steps), batch)
        assert 0.6 <= predicted / measured.noise <= 1.6, codec
        assert measured.bias < 0.2


def test_coarse_codes_before_a_normalisation_are_replayed() -> None:
    """The backward of a LayerNorm multiplies its input's error by itself, far more where a token hardly varies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 5))
    x, targets = torch.randn(16, 32, 16), torch.randint(5, (16, 32))
    x[:, ::8] *= 0.05
    captured, instructions = offered(model, x)
    batch = Batch(model, [x], token_loss, targets)
    noise = estimate(captured, instructions, batch)
    rho = noise.rho["mm"]  # what the LayerNorm reads
    error = {e.codec: e.loss.mean_square_error(model[0](x).detach()) for e in instructions.encoded if e.loss}
    assert rho["int2"] / rho["int4"] > 3 * error["int2"] / error["int4"]
    for codec in ("int4", "int2"):
        steps = rewrite(captured.graph, instructions, all_encoded(captured, instructions, codec, only={"mm"}))
        measured = measure_noise(captured, steps, batch)
        assert rho[codec] == pytest.approx(measured.noise, rel=0.3), codec
    assert error["int8"] < error["int4"]
    assert rho["int8"] == pytest.approx(rho["int4"] * error["int8"] / error["int4"])


def lossy_plan(name: str, gradient_noise: float = 0.1) -> tuple[graphplan.PlannedModule, nn.Module, Tensor, Any]:
    """A plan for a machine with fast codes, at a third of the way from the least peak to the unplanned one."""
    model, x, targets = case(name)
    loss = {"loss_fn": token_loss, "example_targets": targets}
    here = graphplan.optimize(model, "100%", (x,), time_limit=4, codecs="lossy", **loss)
    device = here.device_profile
    ours = [k for k, s in device.samples.items() if s.target in ("encode", "decode") or s.target.endswith(":variant")]
    device.samples.update({k: replace(device.samples[k], cost_ns=1) for k in ours})
    budget = (2 * here.plan.minimum_peak_bytes + here.plan.baseline_peak_bytes) // 3
    noise = here.entry().prepared.noise
    more = {"gradient_noise": gradient_noise, "device": device, "noise": noise, **loss}
    return graphplan.optimize(model, budget, (x,), time_limit=4, codecs="lossy", **more), model, x, loss


@pytest.mark.parametrize("name", ["conv", "transformer"])
def test_a_plan_within_its_cap(name: str) -> None:
    """Noise predicted, measured, verified; the budget held; shipped to a client."""
    planned, model, x, loss = lossy_plan(name)
    plan = planned.plan
    assert 0 < plan.noise <= plan.gradient_noise == 0.1
    assert plan.noise_measured is not None
    assert 0.4 <= plan.noise / plan.noise_measured <= 2.5
    used = {d.codec for d in plan.decisions.values()}
    assert used & set(LOSSY)
    assert name != "transformer" or used & {"fewbit4", "fewbit2"}
    assert "gradient noise: predicted" in str(plan)
    report = graphplan.verify(planned, model, (x,), **loss)
    assert report.peak_bytes <= plan.budget_bytes
    assert graphplan.Plan.from_json(plan.to_json()) == plan
    # The client's side: nothing is estimated there, and the plan's noise stands.
    client = graphplan.apply(model, plan, (x,), **loss)
    assert client.plan.noise == plan.noise
    graphplan.verify(client, model, (x,), **loss)


def test_lossy_codecs_never_raise_the_least_peak() -> None:
    for name in ("conv", "transformer"):
        model, x, targets = case(name)
        loss = {"loss_fn": token_loss, "example_targets": targets}
        least = []
        for codecs in ("none", "exact", "lossy"):
            planned = graphplan.optimize(model, "100%", (x,), time_limit=8, codecs=codecs, **loss)
            least.append(planned.plan.minimum_peak_bytes)
        assert least == sorted(least, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", pytest.param("densenet121", marks=pytest.mark.ci), "gpt"])
def test_codecs_cost_nothing_where_they_do_not_help(name: str) -> None:
    """At the least peak without codecs, by one profile: the plan that may use them is no slower."""
    entry = MODELS[name]
    model, example, device = entry.build_small(), entry.example_small(), graphplan.Device.this()
    loss_fn = entry.loss if example.targets is not None else (lambda outputs: entry.loss(outputs, None))
    given = {"device": device, "time_limit": 10, "loss_fn": loss_fn, "example_targets": example.targets}
    everything = graphplan.optimize(model, "100%", example.inputs, codecs="none", **given).plan
    least = everything.minimum_peak_bytes
    without, allowed = (
        graphplan.optimize(model, least, example.inputs, codecs=codecs, **given).plan for codecs in ("none", "exact")
    )
    assert allowed.overhead <= without.overhead


def test_a_hybrid_plan_is_never_slower_than_codes_alone() -> None:
    """Where a pool's result and its indices both have codes, too: recomputed they come back together."""
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 1, 1))]
    model, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 24 * 24, 5)), torch.randn(8, 8, 24, 24)
    loss = {"loss_fn": token_loss, "example_targets": torch.randint(5, (8,))}
    planned = graphplan.optimize(model, "100%", (x,), codecs="lossy", time_limit=5, **loss)
    prepared, options = planned.entry().prepared, make_options("100%", "lossy", time_limit=5)
    least, cheap = find_least(prepared, options), 0
    codes = [i for i, item in enumerate(prepared.instructions.items) if item.kind in ("encode", "decode", "variant")]
    own = prepared.problem.ops
    ops = tuple(
        replace(op, cost_ns=1 if op.instead_of is None else own[op.instead_of].cost_ns) if i in codes else op
        for i, op in enumerate(own)
    )
    for part in (0.1, 0.2, 0.3, 0.4):
        budget = int(least.least_peak_bytes + part * (prepared.baseline_peak_bytes - least.least_peak_bytes))
        problem = replace(prepared.problem, ops=ops, budget_bytes=budget)
        once = solvers.solve(computing_once(problem), "auto", solvers.Limits(seconds=5))
        if once.schedule is not None:
            cost = solvers.simulate(problem, once.schedule).cost_ns
            found = make_plan(replace(prepared, problem=problem), least, options)
            assert found.overhead <= cost / problem.program_cost_ns() - 1 + 1e-9
            cheap += solvers.solve(problem, "auto", solvers.Limits(seconds=5)).lower_bound_ns > cost
    assert cheap  # alone, solvers prove that nothing of theirs is as fast


def test_no_noise_allowed_means_none() -> None:
    planned, *_ = lossy_plan("conv", gradient_noise=0.0)
    assert planned.plan.noise == planned.plan.gradient_noise == 0
    assert not {d.codec for d in planned.plan.decisions.values()} & set(LOSSY)


def test_verify_sees_a_wrong_code(monkeypatch: pytest.MonkeyPatch) -> None:
    planned, model, x, loss = lossy_plan("conv")
    assert planned.plan.noise > 0
    right = group_kernels.decode

    def wrong(codes: Tensor, low: Tensor, step: Tensor, out: Tensor, bits: int) -> None:
        right(codes, low, 3 * step, out, bits)

    monkeypatch.setattr(group_kernels, "decode", wrong)
    group._kernel.cache_clear()
    try:
        with pytest.raises(graphplan.PromiseBroken, match="gradient noise"):
            graphplan.verify(planned, model, (x,), **loss)
    finally:
        group._kernel.cache_clear()


def test_estimates_are_saved_and_shipped(tmp_path: Path) -> None:
    model, x, targets = case("conv")
    loss = {"loss_fn": token_loss, "example_targets": targets}
    noise = graphplan.estimate_noise(model, (x,), **loss)
    noise.save(tmp_path / "noise.json")
    assert Noise.load(tmp_path / "noise.json") == noise
    adam = graphplan.estimate_noise(model, (x,), weights="adam", **loss)
    assert adam.rho.keys() == noise.rho.keys()
    assert adam != noise
    planned = graphplan.optimize(model, "100%", (x,), codecs="lossy", noise=noise, time_limit=3, **loss)
    assert planned.entry().prepared.noise == noise
    refused = replace(noise, bias={a: dict.fromkeys(rho, 0.5) for a, rho in noise.rho.items()})
    assert {refused.ppb(a, c) for a in noise.rho for c in LOSSY} == {REFUSED_PPB}
    assert noise.ppb("no such activation", "int4") == REFUSED_PPB
    text = (tmp_path / "noise.json").read_text()
    for bad in (text[:-40], "[]", json.dumps({"format": "graphplan-noise-1"}), text.replace('"bias"', '"lean"')):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(NoiseFormatError):
            Noise.load(tmp_path / "bad.json")
    with pytest.raises(graphplan.GraphplanError, match="noise must be"):
        graphplan.optimize(model, "100%", (x,), codecs="lossy", noise=text)  # type: ignore[arg-type]
    with pytest.raises(graphplan.GraphplanError, match="weights"):
        graphplan.estimate_noise(model, (x,), weights="lion")


def test_what_is_not_finite_is_kept() -> None:
    model, x, targets = case("conv")
    x = x.clone()
    x[0, 0, 0, 0] = math.inf
    noise = graphplan.estimate_noise(model, (x,), loss_fn=token_loss, example_targets=targets)
    assert noise.ppb("convolution", "int8") == REFUSED_PPB


def test_steps_round_anew_and_the_seed_repeats_them() -> None:
    planned, model, x, loss = lossy_plan("conv")
    assert planned.plan.noise > 0

    def two_steps() -> list[Tensor]:
        torch.manual_seed(11)
        client = graphplan.apply(model, planned.plan, (x,), **loss)
        found = []
        for _ in range(2):
            model.zero_grad()
            token_loss(client(x), loss["example_targets"]).backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        return found

    def after_others(number: int) -> Tensor:
        """The gradient of one step of a client that has run another before, under another seed."""
        client = graphplan.apply(model, planned.plan, (x,), **loss)
        torch.manual_seed(5)
        client(x)
        torch.manual_seed(11)
        client.step_number = number
        model.zero_grad()
        token_loss(client(x), loss["example_targets"]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    first, second = two_steps(), two_steps()
    assert torch.equal(after_others(1), first[1])
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_a_loss_function() -> None:
    """Random gradients at the outputs give noise of the same order as a loss: rho is a ratio."""
    model, x, targets = case("conv")
    made_up = graphplan.estimate_noise(model, (x,))
    real = graphplan.estimate_noise(model, (x,), loss_fn=token_loss, example_targets=targets)
    assert made_up.rho.keys() == real.rho.keys()
    for name, rho in real.rho.items():
        assert 0.1 < made_up.rho[name]["int4"] / rho["int4"] < 10, name

    class OwnLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return token_loss(self.model(x), y)

    own = graphplan.estimate_noise(OwnLoss(), (x, targets))
    assert own.gradient_variance == pytest.approx(real.gradient_variance, rel=1e-3)
