"""BatchNorm's result written over its input: the same bits, in the memory that the plan says."""

from __future__ import annotations

import pytest
import torch

import graphplan
from graphplan.in_place import batch_norm_
from models_zoo import MODELS

functional = torch.ops.aten._native_batch_norm_legit_functional.default
LAYOUTS = {
    "rows": ((8, 33), torch.contiguous_format),
    "odd": ((3, 7, 5, 3), torch.contiguous_format),
    "large": ((4, 64, 33, 31), torch.contiguous_format),
    "channels last": ((4, 16, 9, 8), torch.channels_last),
    "volumes": ((2, 5, 4, 6, 7), torch.contiguous_format),
}


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_over_its_input_it_is_the_same(layout: str, dtype: torch.dtype, statistics: bool) -> None:
    shape, memory_format = LAYOUTS[layout]
    x = torch.randn(shape).to(dtype, memory_format=memory_format)
    kind = torch.float32 if dtype is torch.bfloat16 else dtype
    weight, bias, mean, var = (torch.rand(shape[1], dtype=kind) for _ in range(4))
    expected = functional(x, weight, bias, mean, var, True, 0.1, 1e-5)
    before = mean.clone()
    found = batch_norm_(x, weight, bias, *((mean, var) if statistics else (None, None)), True, 0.1, 1e-5)
    assert found[0] is x
    assert torch.equal(mean, before)  # a buffer takes its new value at the turn, not here
    for ours, theirs in zip(found, expected if statistics else expected[:3], strict=False):
        assert ours is not None
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["resnet18"])
def test_a_tight_plan_writes_normalisations_over_their_inputs(name: str) -> None:
    entry = MODELS[name]
    torch.manual_seed(0)
    model, example = entry.build_small(), entry.example_small()
    loss = {"loss_fn": entry.loss, "example_targets": example.targets}
    roomy = graphplan.optimize(model, "100%", example.inputs, time_limit=6, **loss)
    tight = roomy.at_budget(int(1.05 * roomy.plan.minimum_peak_bytes))
    graphplan.verify(tight, model, example.inputs, **loss)
    assert "batch_norm_(" in tight.forward_module.code
    assert "batch_norm_(" in tight.backward_module.code
