"""Dropout: the bits and the memory of its two products, and what percentages are of where masks are wide."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import graphplan
from graphplan import functions
from graphplan.meter import peak_of

aten = torch.ops.aten
SPECIAL = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 0.1, -0.7, 3e38, 1.0])
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Attention(nn.Module):
    """Self-attention whose weights are dropped, [N, T, width] to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


def _perceptron(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    layers = [m for _ in range(3) for m in (nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.3))]
    return nn.Sequential(*layers).to(dtype), torch.randn(2048, 64, dtype=dtype)


def squares(out: Tensor) -> Tensor:
    return out.square().mean()


@pytest.mark.parametrize(
    ("model", "x"),
    [
        pytest.param(*_perceptron(torch.float32), id="float32"),
        pytest.param(*_perceptron(torch.bfloat16), id="bfloat16"),
        pytest.param(Attention(), torch.randn(8, 128, 32), id="attention"),
    ],
)
def test_masks_of_dropout_are_as_wide_as_numbers(model: nn.Module, x: Tensor) -> None:
    plain = graphplan.measure(model, x, squares, runs=1).peak_bytes
    plan = graphplan.optimize(model, "100%", x, loss_fn=squares, codecs="none", time_limit=3).plan
    assert abs(plan.baseline_peak_bytes - plain) < 0.001 * plain
    assert dict(plan.saved)["keeping dropout's masks as booleans"] > 0.02 * plain


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors agree in every bit, but for which NaN one is."""
    a, b = (x.contiguous().view(-1) for x in (a, b))
    numbers = ~a.isnan()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[numbers].view(torch.uint8), b[numbers].view(torch.uint8))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_products_are_eager_modes(p: float, dtype: torch.dtype) -> None:
    x = SPECIAL[torch.randint(len(SPECIAL), (57, 33))].to(dtype).t()
    out, mask = aten.native_dropout.default(x, p, True)
    noise = torch.ones_like(x).mul_(mask).div_(1 - p)  # as at::dropout makes it
    assert same(out, x * noise)
    again = functions.dropout_from_mask(x, mask, p)
    assert same(out, again)
    assert again.stride() == out.stride()
    for grad in (x, x.contiguous(), x[:, :1].expand(33, 57)):
        back = functions.dropout_backward(grad, mask, 1 / (1 - p))
        assert same(grad * noise, back)
        assert back.stride() == torch.empty_like(grad).stride()


def test_nothing_stands_beside_the_products() -> None:
    x, mask = torch.randn(1 << 20), torch.rand(1 << 20) > 0.5
    for run in (lambda: functions.dropout_backward(x, mask, 2.0), lambda: functions.dropout_from_mask(x, mask, 0.5)):
        assert peak_of(run, x.device).peak_bytes <= x.nbytes + 64  # scalars


@pytest.mark.parametrize("budget", ["100%", "62%"])
def test_narrow_gradients_are_eager_modes(budget: str) -> None:
    torch.manual_seed(0)
    model, x = _perceptron(torch.bfloat16)
    planned = graphplan.optimize(model, budget, x, loss_fn=squares, time_limit=3)
    found = []
    for run in (model, planned):
        torch.manual_seed(1)
        squares(run(x)).backward()
        found.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
