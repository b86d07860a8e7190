"""Where nothing else fits, a step runs its model on parts of the batch; or says why it cannot."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_step import OPTIMIZERS, plain, twins
from torch import Tensor, nn

import graphplan

X = torch.randn(256, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(256) % 5


def ignoring(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over fewer terms in one part than in another."""
    return F.cross_entropy(outputs, targets, ignore_index=-100)


def wide() -> nn.Module:
    layers = [nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 5)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize(("share", "parts"), [(0.8, 2), (0.65, 4)])
def test_a_step_in_parts_is_the_same_step(share: float, parts: int, tmp_path: Path) -> None:
    targets = torch.where(torch.arange(256) < 100, -100, Y)
    model, optimizer, other, its = twins(wide(), OPTIMIZERS["adamw"])
    full = graphplan.train_step(model, ignoring, optimizer, "100%", X, targets)
    step = full.at_budget(int(share * full.plan.minimum_peak_bytes))
    plan = step.prepare(X, targets)
    assert plan.parts >= parts
    assert f"runs on {plan.parts} parts of the batch" in str(plan)
    assert dict(plan.saved)["running the model on parts of the batch"] > 0
    for _ in range(4):
        assert torch.allclose(step(X, targets), plain(other, its, (X,), targets, ignoring))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)
    measured = graphplan.measure(step, X, example_targets=targets, runs=1).peak_bytes
    assert measured <= plan.budget_bytes
    assert measured == pytest.approx(plan.peak_bytes, rel=0.01)
    plan.save(tmp_path / "plan.json")
    loaded = graphplan.Plan.load(tmp_path / "plan.json")
    again = graphplan.apply(model, loaded, X, loss_fn=ignoring, example_targets=targets, optimizer=optimizer)
    assert graphplan.verify(again, model, X, example_targets=targets).ok


class Coupled(nn.Module):
    """Its outputs for a sample depend on the others, in no module that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = wide()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x - x.mean(0))
        return out


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = wide()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).square().mean()


class FixedBatch(OwnLoss):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + torch.ones(256, 1, dtype=x.dtype)
        return out


@pytest.mark.parametrize(
    ("model", "loss_fn", "targets", "reason"),
    [
        (nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 5)).double(), F.cross_entropy, Y, "'1'"),
        (Coupled(), F.cross_entropy, Y, "depends on the other samples"),
        (FixedBatch(), F.cross_entropy, Y, "does not run on a part of the batch"),
        (OwnLoss(), lambda out: out, None, "give their loss as loss_fn"),
    ],
)
def test_models_whose_samples_do_not_stand_for_themselves(
    model: nn.Module, loss_fn: Any, targets: Tensor | None, reason: str
) -> None:
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    full = graphplan.train_step(model, loss_fn, optimizer, "100%", X, targets)
    with pytest.raises(graphplan.InfeasibleBudget, match=f"cannot be cut in 2 parts: .*{reason}"):
        full.at_budget(full.plan.minimum_peak_bytes // 2).prepare(X, targets)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_infeasible_counts_the_parts() -> None:
    model = wide()
    full = graphplan.train_step(
        model, F.cross_entropy, OPTIMIZERS["sgd"](model.parameters()), "100%", X, Y, time_limit=3
    )
    with pytest.raises(graphplan.InfeasibleBudget) as caught:
        full.at_budget(100_000).prepare(X, Y)
    assert caught.value.minimum_bytes < full.plan.minimum_peak_bytes
    assert full.at_budget(caught.value.minimum_bytes).prepare(X, Y).parts > 1
