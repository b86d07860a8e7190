"""Every door takes a batch in the same forms."""

from __future__ import annotations

import torch
from test_semantics import Net

import graphplan


def test_a_mapping_of_example_inputs_is_keyword_arguments() -> None:
    """At every door, as at `train_step`'s."""
    model, inputs = Net(), {"x": torch.randn(256, 16), "scale": 2.0}
    planned = graphplan.optimize(model, "100%", inputs, time_limit=2)
    plan = planned.plan
    planned(**inputs)
    assert len(planned._entries) == 1
    assert graphplan.verify(planned, model, inputs).ok
    assert graphplan.measure(planned, inputs, runs=1).peak_bytes <= plan.budget_bytes
    assert graphplan.pareto(model, inputs, points=2, time_limit=2)[-1].fingerprint == plan.fingerprint
    assert graphplan.apply(model, plan, inputs).plan == plan
    assert graphplan.estimate_noise(model, inputs).rho
