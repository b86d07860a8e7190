"""Models of the transformers library: the promises about bytes and gradients, for `optimize` and for whole steps.

CI runs a few, `make foreign` all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from foreign_models import FOREIGN, REFUSED
from torch import Tensor, nn

import graphplan

pytest.importorskip("transformers")
FEW = ("gpt2", "t5", "swin", "mamba")  # one of each kind
Gradients = dict[str, Tensor]


def loss_of(outputs: Any) -> Tensor:
    """Return the model's own loss, or one of all that it returns."""
    if outputs.get("loss") is not None:
        return outputs["loss"]
    floats = [v for v in outputs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    return torch.stack([v.float().square().mean() for v in floats]).sum()


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put buffers and random numbers back."""
    before = copy.deepcopy(dict(model.named_buffers()))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        yield
    for name, buffer in model.named_buffers():
        buffer.data.copy_(before[name])


def gradients(module: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> Gradients:
    with unchanged(model):
        loss_of(module(**inputs)).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def error(found: Gradients, expected: Gradients) -> float:
    """Return the largest difference over the largest gradient."""
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    return max(float((found[n] - expected[n]).abs().max()) for n in expected) / largest


@pytest.mark.parametrize("name", FEW)
def test_planned_and_verified(name: str) -> None:
    model, inputs = FOREIGN[name]()
    model.train()
    free = graphplan.optimize(model, "100%", inputs, loss_fn=loss_of, time_limit=3)
    planned = free.at_budget((free.plan.minimum_peak_bytes + free.plan.baseline_peak_bytes) // 2)
    graphplan.verify(planned, model, inputs, loss_fn=loss_of)
    assert type(planned(**inputs)) is type(model(**inputs))
    assert any(d.fate != "keep" for d in planned.plan.decisions.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", FOREIGN)
def test_promises_at_three_budgets(name: str) -> None:
    """Measured bytes are the predicted ones, at most the budget; gradients are plain PyTorch's, within rounding."""
    model, inputs = FOREIGN[name]()
    model.train()
    expected = gradients(model, model, inputs)
    free = graphplan.optimize(model, "100%", inputs, loss_fn=loss_of, time_limit=6)
    least, most = free.plan.minimum_peak_bytes, free.plan.baseline_peak_bytes
    for planned in (free, free.at_budget((least + most) // 2), free.at_budget(least)):
        planned.prepare(**inputs)
        assert error(gradients(planned, model, inputs), expected) < 1e-4
        with unchanged(model):
            measured = graphplan.measure(planned, inputs, loss_of, runs=1).peak_bytes
        assert 0.99 * planned.plan.peak_bytes <= measured <= planned.plan.peak_bytes <= planned.plan.budget_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", FOREIGN)
def test_steps_train_as_plain_pytorch_does(name: str) -> None:
    """Two steps of SGD at the least peak: measured bytes within the budget, parameters as in the plain loop."""
    model, inputs = FOREIGN[name]()
    model.train()
    plain = copy.deepcopy(model)
    options = {"lr": 1e-2, "momentum": 0.9}
    optimizer = torch.optim.SGD(model.parameters(), **options)
    step = graphplan.train_step(model, loss_of, optimizer, "100%", inputs, time_limit=6)
    step = step.at_budget(step.plan.minimum_peak_bytes)
    other = torch.optim.SGD(plain.parameters(), **options)
    for k in range(2):
        torch.manual_seed(k)
        loss = step(inputs)
        torch.manual_seed(k)
        other.zero_grad()
        expected = loss_of(plain(**inputs))
        expected.backward()
        other.step()
        assert torch.allclose(loss, expected, rtol=1e-4)
    moved = max(float((a - b).abs().max()) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert moved < 1e-4
    measured = graphplan.measure(step, inputs, runs=1).peak_bytes
    assert 0.99 * step.plan.peak_bytes <= measured <= step.plan.peak_bytes <= step.plan.budget_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_one_graph_cannot_hold_is_refused_with_the_reason(name: str) -> None:
    model, inputs = REFUSED[name]()
    with pytest.raises((graphplan.CaptureError, graphplan.UnsupportedModel), match=r"autograd\.Function|this line"):
        graphplan.optimize(model, "100%", inputs, loss_fn=loss_of)
