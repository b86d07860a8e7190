"""Gradients of concatenations are added whole: the same bits, in fewer ops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphplan
from graphplan.capture import capture


class Dense(nn.Module):
    """Every layer reads all that came before it, as DenseNet's do."""

    def __init__(self, layers: int = 4, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList()
        for k in range(layers):
            width = 6 + 4 * k
            before = nn.BatchNorm2d(width) if norm else nn.Identity()
            self.layers.append(nn.Sequential(before, nn.ReLU(), nn.Conv2d(width, 4, 3, padding=1)))
        self.head = nn.Linear(6 + 4 * layers, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.first(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return self.head(torch.cat(found, 1).relu().mean((2, 3)))


class Thrice(nn.Module):
    """Three concatenations of the same parts, `turned`: one with the last part first."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
        self.out = nn.Linear(18, 4)
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        a = [part(x) for part in self.parts]
        b = a[::-1] if self.turned else a
        return self.out(torch.cat(a, 1).tanh()) + self.out(torch.cat(b, 1).sin()) + self.out(torch.cat(a, 1).cos())


def ops(model: nn.Module, x: Tensor) -> Counter[str]:
    graph = capture(model, (x,), {}).graph.module.graph
    return Counter(n.target.__name__ for n in graph.nodes if n.op == "call_function")


def gradients(module: nn.Module, model: nn.Module, x: Tensor) -> list[Tensor]:
    buffers = [b.clone() for b in model.buffers()]
    module(x).square().mean().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for b, old in zip(model.buffers(), buffers, strict=True):
        b.data.copy_(old)
    return found


BATCHES: dict[str, Callable[[], Tensor]] = {
    "batch": lambda: torch.randn(4, 3, 12, 12),
    "one image": lambda: torch.randn(1, 3, 12, 12),
    "channels last": lambda: torch.randn(4, 3, 12, 12).to(memory_format=torch.channels_last),
    "doubles": lambda: torch.randn(4, 3, 12, 12, dtype=torch.float64),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("norm", [True, False])
def test_dense_models_have_plain_pytorchs_gradients_to_the_bit(name: str, norm: bool) -> None:
    x = BATCHES[name]()
    model = Dense(norm=norm).to(dtype=x.dtype)
    if name == "channels last":
        model = model.to(memory_format=torch.channels_last)
    free = graphplan.optimize(model, "100%", x, time_limit=3)
    least = free.at_budget(free.plan.minimum_peak_bytes)
    expected = gradients(model, model, x)
    for planned in (free, least):
        assert all(torch.equal(a, b) for a, b in zip(gradients(planned, model, x), expected, strict=True))
    graphplan.verify(least, model, x)


def test_sums_of_parts_become_one() -> None:
    """Five tensors are concatenated with 2, 3, 4 and 5 parts; every sum but the last one's is of all parts at once."""
    found = ops(Dense(), torch.randn(4, 3, 12, 12))
    assert found["add.Tensor"] <= 4 + 4  # and the counters of BatchNorm
    assert found["slice.Tensor"] <= 3 * 4


@pytest.mark.parametrize("turned", [False, True])
def test_only_parts_in_the_same_order_are_merged(turned: bool) -> None:
    model, x = Thrice(turned), torch.randn(5, 8)
    assert ops(Thrice(False), x)["add.Tensor"] < ops(Thrice(True), x)["add.Tensor"]
    planned = graphplan.optimize(model, "100%", x)
    expected = gradients(model, model, x)
    assert all(torch.equal(a, b) for a, b in zip(gradients(planned, model, x), expected, strict=True))
