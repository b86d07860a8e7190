"""Models that bring their own backward (torch.autograd.Function): the same gradients, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphplan


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * grad


class Rounded(nn.Module):
    def __init__(self, registered: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        if registered:
            self.register_buffer("scale", torch.full((8,), 2.0))
        else:
            self.scale = torch.full((8,), 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(StraightThrough.apply(self.first(x)) * self.scale)


@torch.library.custom_op("graphplan_tests::straight_through", mutates_args=())
def straight_through(x: Tensor) -> Tensor:
    return x.round()


straight_through.register_fake(torch.empty_like)
straight_through.register_autograd(lambda ctx, grad: 3 * grad)


class CustomOp(Rounded):
    """A custom op has its backward registered; the plain tensor sends the capture through torch.export."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(straight_through(self.first(x)) * self.scale)


@pytest.mark.parametrize("build", [lambda: Rounded(True), lambda: CustomOp(True), lambda: CustomOp(False)])
def test_its_gradients_are_kept(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = build(), torch.randn(16, 8)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    planned = graphplan.optimize(model, "100%", (x,), time_limit=2)
    planned(x).square().sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, grad)  # type: ignore[arg-type]


def test_where_its_backward_would_be_lost_it_is_refused() -> None:
    with pytest.raises(graphplan.UnsupportedModel, match=r"StraightThrough.*register"):
        graphplan.optimize(Rounded(registered=False), "100%", (torch.randn(16, 8),), time_limit=2)
    assert StraightThrough.apply(torch.tensor(0.6)) == 1
