"""Batches of other sizes: decisions are carried over, a percentage is of the largest, what does not fit is solved."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_semantics import Net
from torch import nn

import graphplan
from models_zoo import MODELS


def test_the_smaller_last_batch_keeps_the_decisions() -> None:
    planned = graphplan.optimize(Net(), 10_000_000, (torch.randn(1024, 16),), time_limit=2)
    fates = {n: d.fate for n, d in planned.plan.decisions.items()}
    planned(torch.randn(100, 16)).sum().backward()
    assert "carried" in planned.plan.solver
    assert {n: d.fate for n, d in planned.plan.decisions.items()} == fates


def test_a_percentage_is_of_the_largest_batch_so_far() -> None:
    planned = graphplan.optimize(Net(), "75%", (torch.randn(1024, 16),), time_limit=2)
    budget = planned.plan.budget_bytes
    planned(torch.randn(2, 16)).sum().backward()
    assert planned.plan.budget_bytes == budget
    planned(torch.randn(2048, 16)).sum().backward()
    assert planned.plan.budget_bytes == int(0.75 * planned.plan.baseline_peak_bytes) > budget


def test_a_larger_batch_that_no_longer_fits_is_solved_again() -> None:
    x, larger = torch.randn(512, 16), torch.randn(560, 16)
    unplanned = graphplan.optimize(Net(), "100%", (x,), time_limit=2).plan
    planned = graphplan.optimize(Net(), unplanned.peak_bytes, (x,), time_limit=2)
    planned(larger).sum().backward()
    assert "carried" not in planned.plan.solver
    assert planned.plan.peak_bytes <= unplanned.peak_bytes


def test_the_loss_of_other_batches_is_measured_on_the_example_s_targets() -> None:
    entry = MODELS["resnet18"]
    model, example = entry.build_small(), entry.example_small()
    (x,), y = example.inputs, example.targets
    loss = nn.functional.cross_entropy
    planned = graphplan.optimize(model, "100%", (x,), loss_fn=loss, example_targets=y, time_limit=2)
    for images, labels in ((x[:3].clone(), y[:3].clone()), (torch.cat([x, x]), torch.cat([y, y]))):
        loss(planned(images), labels).backward()
        model.zero_grad()
        assert "for the loss (measured)" in str(planned.plan)
        found = graphplan.measure(planned, (images,), loss, example_targets=labels, runs=1)
        assert found.peak_bytes <= planned.plan.peak_bytes <= planned.plan.budget_bytes


def test_a_longer_sequence_is_planned_without_its_targets() -> None:
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 50))

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    x = torch.randint(50, (8, 32))
    lossy: dict[str, Any] = {"codecs": "lossy", "loss_fn": loss, "example_targets": x}
    planned = graphplan.optimize(model, "90%", (x,), time_limit=2, **lossy)
    for length in (24, 48):
        tokens = torch.randint(50, (8, length))
        loss(planned(tokens), tokens).backward()
        assert "for the loss (measured)" not in str(planned.plan)
        found = graphplan.measure(planned, (tokens,), loss, example_targets=tokens, runs=1)
        assert found.peak_bytes <= planned.plan.peak_bytes <= planned.plan.budget_bytes


@pytest.fixture
def threads() -> Iterator[int]:
    """Give the number of threads back."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_more_threads_take_more_scratch_and_are_planned_for(threads: int) -> None:
    entry = MODELS["unet"]
    model, example = entry.build_small(), entry.example_small()
    call: dict[str, Any] = {"loss_fn": entry.loss, "example_targets": example.targets}
    torch.set_num_threads(1)
    planned = graphplan.optimize(model, "75%", example.inputs, time_limit=10, **call)
    alone = planned.plan
    torch.set_num_threads(2)
    found = graphplan.measure(planned, example.inputs, **call)
    assert found.peak_bytes == planned.plan.peak_bytes <= planned.plan.budget_bytes
    assert planned.device_profile.threads == 2
    torch.set_num_threads(1)
    planned(*example.inputs)
    assert planned.plan is alone  # nothing is planned twice


def test_a_module_that_is_changed_or_replaced_is_captured_anew() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.9), nn.Linear(8, 4))
    planned, x = graphplan.optimize(model, "100%"), torch.randn(6, 8)
    planned(x).sum().backward()
    model[2].p = 0.0  # as a schedule would set it
    assert torch.equal(planned(x), model(x))
    model[1] = nn.GELU()
    assert torch.equal(planned(x), model(x))
    before = planned.entry()
    planned(x).sum().backward()
    assert planned.entry() is before


def test_a_loss_that_is_changed_is_captured_anew() -> None:
    model, loss = nn.Linear(8, 4), nn.CrossEntropyLoss()
    x, y = torch.randn(6, 8), torch.randint(0, 4, (6,))
    step = graphplan.train_step(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), "100%", x, y)
    step(x, y)
    loss.label_smoothing = 0.3
    assert torch.equal(loss(model(x), y), step(x, y))


def test_two_calls_before_a_backward_are_warned_of() -> None:
    planned, x = graphplan.optimize(Net(), "100%"), torch.randn(6, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            loss = planned(x).sum()  # the last loss is alive, its values are not
            loss.backward()
        with torch.no_grad():
            planned(x)
        planned(x)  # nobody asked for its backward
        one = planned(x)
    with pytest.warns(RuntimeWarning, match="wait for their backward"):
        two = planned(x)
    (one + two).sum().backward()
