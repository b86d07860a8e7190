"""What percentages are of: the peak of plain PyTorch's own step, found without running one."""

from __future__ import annotations

import pytest

import graphplan
from models_zoo import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_the_unplanned_peak_is_plain_pytorchs(name: str) -> None:
    entry = MODELS[name]
    model, example = entry.build_small(), entry.example_small()
    targets = example.targets
    loss = entry.loss if targets is not None else (lambda out: entry.loss(out, None))
    plain = graphplan.measure(model, example.inputs, loss, example_targets=targets, runs=1).peak_bytes
    said = {"loss_fn": loss, "example_targets": targets, "codecs": "none", "time_limit": 1}
    plan = graphplan.optimize(model, "100%", example.inputs, **said).plan
    assert plan.baseline_peak_bytes == pytest.approx(plain, rel=2e-4)
