"""Complex parameters, as spectral layers have them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lossy_cases import all_encoded, offered
from torch import Tensor, nn

import graphplan
from graphplan.noise import estimate, measure_noise
from graphplan.replay import Batch
from graphplan.rewrite import rewrite

X = torch.randn(64, 8, 32)


class Spectral(nn.Module):
    """A layer between a Fourier transform and its inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 32))
        self.last = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 32))
        self.modes = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft(self.wide(x))
        return self.last(torch.fft.irfft(torch.einsum("bcl,cd->bdl", found, self.modes), n=32))


def loss_fn(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


def planned(model: nn.Module, **options: Any) -> Any:
    free = graphplan.optimize(model, "100%", (X,), loss_fn=loss_fn, **options)
    tight = free.at_budget(free.plan.minimum_peak_bytes)
    tight.prepare(X)
    return tight


def test_bytes_and_gradients() -> None:
    model = Spectral()
    found = planned(model)
    assert any(d.fate != "keep" for d in found.plan.decisions.values())
    graphplan.verify(found, model, (X,), loss_fn=loss_fn)


def test_noise_is_estimated_of_real_and_imaginary_parts() -> None:
    model = Spectral()
    captured, instructions = offered(model, X)
    batch = Batch(model, [X], loss_fn, None)
    noise = estimate(captured, instructions, batch)
    steps = all_encoded(captured, instructions, "int4")
    used = [s.removesuffix("__int4") for s in steps if s.endswith("__int4")]
    assert used
    measured = measure_noise(captured, rewrite(captured.graph, instructions, steps), batch)
    assert 0.6 <= sum(noise.rho[a]["int4"] for a in used) / measured.noise <= 1.6


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.01}])
def test_steps_update_as_the_plain_loop_does(name: str, options: dict[str, float]) -> None:
    model = Spectral()
    plain = copy.deepcopy(model)
    ours, theirs = (getattr(torch.optim, name)(m.parameters(), lr=0.01) for m in (model, plain))
    step = graphplan.train_step(model, loss_fn, ours, "100%", X, **options)
    step = step.at_budget(step.plan.minimum_peak_bytes)
    for _ in range(3):
        step(X)
        theirs.zero_grad()
        loss_fn(plain(X)).backward()
        if options:
            nn.utils.clip_grad_norm_(plain.parameters(), options["clip_norm"])
        theirs.step()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-6)
    assert graphplan.measure(step, X, runs=1).peak_bytes <= step.plan.peak_bytes


def test_the_norm_of_a_complex_gradient_is_real() -> None:
    """What gradients are multiplied by is real, as traced and as run: a real gradient stays real."""
    model = Spectral()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphplan.train_step(model, loss_fn, optimizer, "100%", X, clip_norm=0.01)
    nodes = list(step.source(X).captures()[0].graph.module.graph.nodes)
    norms = [n for n in nodes if n.target is torch.ops.aten.linalg_vector_norm.default]
    (factor,) = {n for norm in norms for n in norm.users}
    assert any(n.all_input_nodes[0].meta["val"].is_complex() for n in norms)
    assert {n.meta["val"].dtype for n in (*norms, factor)} == {torch.float32}


def test_clipping_by_value_is_refused() -> None:
    model = Spectral()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(graphplan.GraphplanError, match=r"'modes' is complex.*clip_norm"):
        graphplan.train_step(model, loss_fn, optimizer, "100%", X, clip_value=0.1)
