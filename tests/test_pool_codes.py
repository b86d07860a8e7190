"""Max-pool's backward from packed indices: ATen's bits, without the int64 indices or the pool's input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_step import OPTIMIZERS, plain, same, twins
from torch import Tensor, nn

import graphplan
from graphplan import functions
from graphplan.choices import candidates_of
from graphplan.optimize import make_plan
from graphplan.step import extend

aten = torch.ops.aten
CASES = {  # size, kernel, stride, padding, dilation, ceil mode
    "halves": ((8, 6, 28, 28), 2, 2, 0, 1, False),
    "overlapping": ((3, 5, 33, 31), 3, 2, 1, 1, False),
    "ceil": ((2, 7, 15, 14), 3, 2, 1, 1, True),
    "dilated": ((2, 3, 20, 24), (2, 3), 1, (0, 1), (1, 2), False),
    "several blocks": ((3, 20, 256, 200), 2, 2, 0, 1, False),
    "blocks of images": ((70, 3, 200, 100), 2, 2, 0, 1, False),
    "no batch": ((4, 18, 16), 2, 2, 0, 1, False),
}


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_pooling_s_own_backward(case: str, dtype: torch.dtype) -> None:
    size, *numbers, ceil = CASES[case]
    kernel, stride, padding, dilation = map(pair, numbers)
    torch.manual_seed(0)
    x = torch.randn(size).to(dtype)
    x.view(-1)[::97] = math.nan
    out, indices = aten.max_pool2d_with_indices.default(x, kernel, stride, padding, dilation, ceil)
    grad = torch.randn(out.shape).to(dtype)
    pooling = (size[-2:], kernel, stride, padding, dilation)
    packed = functions.pack_pool_indices(indices, *pooling)
    expected = aten.max_pool2d_with_indices_backward.default(grad, x, kernel, stride, padding, dilation, ceil, indices)
    both = functions.max_pool2d_to_codes(x, *pooling, ceil)
    assert torch.equal(both[0].nan_to_num(), out.nan_to_num())
    assert torch.equal(both[1], packed)
    for given in (grad, grad.transpose(-1, -2).contiguous().transpose(-1, -2)):
        assert torch.equal(functions.max_pool2d_backward_from_codes(given, packed, size, *pooling, ceil), expected)


def test_codes_from_nowhere_write_nowhere_else() -> None:
    pooling = ((8, 8), (2, 2), (2, 2), (0, 0), (1, 1))
    packed = torch.full((functions.pool_code_bytes((2, 3, 4, 4), (48, 16, 4, 1), pooling),), 255, dtype=torch.uint8)
    found = functions.max_pool2d_backward_from_codes(torch.ones(2, 3, 4, 4), packed, (2, 3, 8, 8), *pooling, False)
    assert found.sum() == 2 * 3 * 4 * 4
    with pytest.raises(ValueError, match="is not of an input"):
        functions.max_pool2d_backward_from_codes(torch.ones(3, 3, 4, 4), packed, (2, 3, 8, 8), *pooling, False)


class Stages(nn.Module):
    """Pools of several kinds: one that overlaps, one whose indices are asked for, one whose windows are too large."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.layers[0](x).relu(), 3, 2, 1)
        x, places = F.max_pool2d(self.layers[1](x).tanh(), 2, ceil_mode=True, return_indices=True)
        x = x + 1e-3 * places
        x = F.max_pool2d(self.layers[2](x), 2)
        return F.max_pool2d(self.layers[3](x), 17, 1, 8).mean((2, 3))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pools_of_whole_steps_pack_their_indices(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extend, "LEAST_BYTES", 1 << 12)
    torch.manual_seed(0)
    model, optimizer, other, its = twins(Stages().to(memory_format=layout), OPTIMIZERS["momentum"])
    x, y = torch.randn(4, 3, 150, 170).to(memory_format=layout), torch.randn(4, 8)
    ample = graphplan.train_step(model, F.mse_loss, optimizer, "100%", x, y, time_limit=4)
    assert "max_pool2d_to_codes" not in ample.graph_module.code  # slower, so only where memory asks for it
    sliced = candidates_of(model, ample.source(x, y), ample.options)[-1]
    plan = make_plan(sliced.prepared, sliced.least(ample.options), ample.options)
    step = graphplan.apply(model, plan, x, loss_fn=F.mse_loss, example_targets=y, optimizer=optimizer)
    packed = step.graph_module.code.count("max_pool2d_to_codes.default")
    assert packed == (2 if layout is torch.contiguous_format else 0)
    for _ in range(3):
        assert torch.equal(step(x, y), plain(other, its, (x,), y, F.mse_loss))
    same(model, optimizer, other, its)
    assert graphplan.measure(step, x, example_targets=y, runs=1).peak_bytes == step.plan.peak_bytes
