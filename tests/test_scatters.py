"""In-place code in a model: results take their own size of memory, whatever they are parts of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphplan


def row_by_row(y: Tensor, part: Tensor) -> None:
    for i in range(1, 6):
        y[:, i] = y[:, i - 1].clone() + y[:, i]


WAYS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "one": lambda y, part: y[:, 1].copy_(part),
    "last of a part": lambda y, part: y[:, 2:5][:, -1].copy_(part),
    "some": lambda y, part: y[:, 2:5].mul_(2),
    "from the end": lambda y, part: y[..., -3:].copy_(y[..., :3].clone()),
    "every other": lambda y, part: y[:, ::2].copy_(torch.exp(y[:, ::2])),
    "row by row": row_by_row,
    "one number in all": lambda y, part: y[:, 3].fill_(2.0),
    "a row in all": lambda y, part: y[:, 4:6].copy_(part[0]),
    "diagonal": lambda y, part: y.diagonal(dim1=1, dim2=2).mul_(3),
    "other order": lambda y, part: y.transpose(1, 2)[:, :, 5].copy_(part),
    "other dtype": lambda y, part: y[:, 1].copy_(part.double()),
}


class Written(nn.Module):
    """A layer, its result written to, and a layer that reads all of it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.write = WAYS[how]
        self.before, self.after = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        self.write(y, 2 * y[:, 1])
        return self.after(torch.relu(y)).sin()


@pytest.mark.parametrize("how", WAYS)
def test_writing_to_parts(how: str) -> None:
    check(Written(how), torch.randn(4, 8, 32))


SCATTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": lambda x: torch.select_scatter(x, x[:, 1] * 2, 1, 1),
    "some": lambda x: torch.slice_scatter(x, x[:, 2:4] * 2, 1, 2, 4),
    "every other": lambda x: torch.slice_scatter(x, x[:, ::2] * 2, 1, 0, 8, 2),
    "diagonal": lambda x: torch.diagonal_scatter(x, torch.zeros(4, 8), 0, 1, 2),
}


class Scattered(nn.Module):
    """A part of the batch is another in the copy that a layer reads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.scatter, self.layer = SCATTERS[how], nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.scatter(x))


@pytest.mark.parametrize("how", SCATTERS)
def test_a_batch_that_is_a_slice_of_a_data_set(how: str) -> None:
    check(Scattered(how), torch.randn(64, 8, 32)[:4])


class Folded(nn.Module):
    """Overlapping windows, each through a layer, put together: torch returns a fold in memory of the windows' size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Conv1d(36, 36, 1), nn.Conv2d(4, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.layer(functional.unfold(x, 3, padding=1))
        return self.last(functional.fold(windows, (16, 16), 3, padding=1).sin()).sin()


def test_folds() -> None:
    check(Folded(), torch.randn(2, 4, 16, 16))


def squares(y: Tensor) -> Tensor:
    return y.square().mean()


def check(model: nn.Module, x: Tensor) -> None:
    """Gradients are plain PyTorch's, and measured bytes the predicted ones, from the least budget to all."""
    squares(model(x)).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    free = graphplan.optimize(model, "100%", x, loss_fn=squares, time_limit=2)
    for budget in (free.plan.minimum_peak_bytes, free.plan.baseline_peak_bytes):
        planned = free.at_budget(budget)
        model.zero_grad()
        squares(planned(x)).backward()
        for p, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-6, atol=1e-8)
        measured = graphplan.measure(planned, x, squares, runs=1).peak_bytes
        assert 0.98 * planned.plan.peak_bytes <= measured <= planned.plan.peak_bytes <= budget
