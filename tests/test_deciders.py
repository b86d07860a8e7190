"""Backwards that ask the forward's result instead of its input: the same bits, and one activation less."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphplan
from graphplan.capture import capture

aten = torch.ops.aten
ONLY = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 2.0**-1074}


class Twice(nn.Module):
    """Twice what a module returns, so that its result is none of the caller's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) * 2


def values(dtype: torch.dtype, bounds: tuple[float, ...]) -> Tensor:
    """Return ordinary numbers, those around the bounds, and all that are none."""
    ends = torch.tensor([*bounds, 0.0, -0.0, 1.0, -1.0]).to(dtype)
    up, down = torch.full_like(ends, math.inf), torch.full_like(ends, -math.inf)
    around = torch.cat([ends, torch.nextafter(ends, up), torch.nextafter(ends, down)])
    odd = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(dtype).max, ONLY[dtype], -ONLY[dtype]]).to(dtype)
    return torch.cat([around, odd, torch.randn(1000).to(dtype)])


@pytest.mark.parametrize("dtype", ONLY)
@pytest.mark.parametrize(
    "module",
    [nn.ReLU6(), nn.Hardtanh(), nn.Hardtanh(-0.2, 0.3), nn.Hardtanh(-0.5, 0.25), nn.Hardtanh(-math.inf, 0.7),
     nn.LeakyReLU(), nn.LeakyReLU(0.0), nn.LeakyReLU(1e-30), nn.LeakyReLU(2.0), nn.LeakyReLU(-0.1)],
    ids=str,
)  # fmt: skip
def test_the_same_bits(module: nn.Module, dtype: torch.dtype) -> None:
    model = Twice(module)
    bounds = tuple(getattr(module, name) for name in ("min_val", "max_val") if hasattr(module, name))
    x = values(dtype, bounds).requires_grad_()
    weight = torch.randn(len(x)).to(dtype)
    expected = torch.autograd.grad((model(x) * weight).sum(), x)[0]
    planned = graphplan.optimize(model, "100%", x, loss_fn=lambda y: (y * weight).sum(), codecs="none", time_limit=2)
    found = torch.autograd.grad((planned(x) * weight).sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), expected.signbit())


def squares(y: Tensor) -> Tensor:
    return y.square().mean()


def asked(module: nn.Module, dtype: torch.dtype) -> list[Any]:
    """Return the targets of what the backward of `module` asks."""
    x = torch.randn(8, dtype=dtype, requires_grad=True)
    nodes = capture(Twice(module), (x,)).graph.module.graph.nodes
    return [n.args[1].target for n in nodes if "_backward" in str(n.target)]


def test_only_where_the_result_tells() -> None:
    for dtype in ONLY:
        assert asked(nn.ReLU6(), dtype) == [aten.hardtanh.default]
        assert asked(nn.LeakyReLU(0.3), dtype) == [aten.leaky_relu.default]
        assert asked(nn.LeakyReLU(-0.3), dtype) != [aten.leaky_relu.default]
    assert asked(nn.Hardtanh(-0.2, 0.3), torch.float32) == [aten.hardtanh.default]
    assert asked(nn.Hardtanh(-0.2, 0.3), torch.bfloat16) != [aten.hardtanh.default]


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.LeakyReLU])
def test_the_input_dies(activation: type[nn.Module]) -> None:
    layers = [m for _ in range(4) for m in (nn.Linear(256, 256), nn.LayerNorm(256), activation())]
    model, x = nn.Sequential(*layers), torch.randn(4096, 256)
    plain = graphplan.measure(model, x, squares, runs=1).peak_bytes
    planned = graphplan.optimize(model, "100%", x, loss_fn=squares, codecs="none", time_limit=3)
    plan = planned.plan
    assert abs(plan.baseline_peak_bytes - plain) < 0.001 * plain  # percentages are of what autograd keeps
    found = graphplan.measure(planned, x, squares, runs=1).peak_bytes
    assert plan.peak_bytes - 16 <= found <= plan.peak_bytes < plain - 2 * x.nbytes
    assert dict(plan.saved)["asking results in place of inputs"] == 3 * x.nbytes


@pytest.mark.parametrize("module", [nn.ReLU6(), nn.LeakyReLU()])
def test_what_the_caller_writes_to(module: nn.Module) -> None:
    x = torch.linspace(-7, 7, 29, requires_grad=True)
    planned = graphplan.optimize(module, "100%", x, time_limit=2)
    found = []
    for run in (module, planned):
        y = run(x)
        y.mul_(-100)
        found.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*found)
