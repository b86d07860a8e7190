"""A weight used many times: its gradient's products are added where they are computed, over the sum so far."""

from __future__ import annotations

import pytest
import torch
from test_step import OPTIMIZERS, plain, twins
from torch import Tensor, nn

import graphplan
from graphplan.in_place import forms_of

WIDTH = 300
aten = torch.ops.aten


class Recurrent(nn.Module):
    """One layer, used `times` times."""

    def __init__(self, times: int = 6) -> None:
        super().__init__()
        self.times = times
        self.hidden = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.hidden(x))
        return x


class Shared(nn.Module):
    """The product of `moved` is a whole gradient, and a summand of that of `base`."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)
        self.moved = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.base) @ (self.base + self.moved)


def mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("build", [Recurrent, Shared])
def test_products_are_added_where_they_are_computed(build: type[nn.Module], kind: str) -> None:
    model, optimizer, other, its = twins(build().double(), OPTIMIZERS[kind])
    x, y = torch.randn(8, WIDTH, dtype=torch.float64), torch.randn(8, WIDTH, dtype=torch.float64)
    step = graphplan.train_step(model, mean_square, optimizer, "100%", x, y)
    assert "addmm_.default" not in step.graph_module.code  # to the bit where there is room
    to_the_bit, less = step.least_peaks(x, y)
    if build is Recurrent and kind == "sgd":  # with its state, the update is the highest moment
        assert to_the_bit - less >= 0.9 * WIDTH * WIDTH * 8
    tight = step.at_budget(less)
    for _ in range(3):
        torch.testing.assert_close(tight(x, y), plain(other, its, (x,), y, mean_square))
    if build is Recurrent and kind == "sgd":
        assert "addmm_.default" in tight.graph_module.code
        assert "adding products where they are computed" in dict(tight.plan.saved)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert graphplan.measure(tight, x, example_targets=y, runs=1).peak_bytes == tight.plan.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 5, 70), (64, 300, 257), (7, 0, 9)])
@pytest.mark.parametrize("turned", [False, True])
def test_over_its_summand_a_product_is_the_same(shape: tuple[int, int, int], dtype: torch.dtype, turned: bool) -> None:
    rows, inner, columns = shape
    total = torch.randn(rows, columns, dtype=dtype)
    a = torch.randn(inner, rows, dtype=dtype).t() if turned else torch.randn(rows, inner, dtype=dtype)
    b = torch.randn(inner, columns, dtype=dtype)
    over, beside = forms_of(aten.addmm.default, "CPU")
    assert over is aten.addmm_.default
    assert beside is None
    expected = torch.addmm(total, a, b, beta=0.5, alpha=2)
    assert torch.equal(over(total, a, b, beta=0.5, alpha=2), expected)


def test_a_user_s_own_sum_of_products_is_written_over() -> None:
    """In `optimize`, to the bit: what the product is added to dies there."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ParameterList(torch.randn(WIDTH, WIDTH) / WIDTH for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            total = x * 2
            for p in self.layers:
                total = torch.addmm(total, x, p)
            return total

    torch.manual_seed(0)
    model, x = Sums(), torch.randn(200, WIDTH)
    planned = graphplan.optimize(model, "100%", x)
    assert "addmm_.default" in planned.forward_module.code
    assert graphplan.verify(planned, model, x).ok
    assert graphplan.measure(planned, x, runs=1).peak_bytes <= planned.plan.peak_bytes
