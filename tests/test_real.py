"""The promises at real sizes. CI runs one model; `make test-all` runs them all."""

from __future__ import annotations

import pytest

import graphplan
from models_zoo import MODELS

NAMES = [pytest.param(n, marks=pytest.mark.ci) if n == "resnet18" else n for n in MODELS]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_promises_at_real_size(name: str) -> None:
    entry = MODELS[name]
    model, example = entry.build(), entry.example()
    loss_fn = entry.loss if example.targets is not None else (lambda outputs: entry.loss(outputs, None))
    loss = {"loss_fn": loss_fn, "example_targets": example.targets}
    full = graphplan.optimize(model, "100%", example.inputs, time_limit=15, **loss)
    least, top = full.plan.minimum_peak_bytes, full.plan.baseline_peak_bytes
    for budget in (least, (least + top) // 2, top):
        planned = full.at_budget(budget)
        report = graphplan.verify(planned, model, example.inputs, **loss)
        assert report.peak_bytes <= budget
        assert planned.plan.peak_bytes <= budget
