"""Profiling: what it holds while it times an op, and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphplan
from graphplan import profile
from graphplan.meter import Meter


def _bytes(values: list[Any]) -> int:
    found = {v.data_ptr(): v.untyped_storage().nbytes() for v in values if isinstance(v, Tensor)}
    return sum(found.values())


@pytest.mark.parametrize("codecs", ["exact", "lossy"])
def test_profiling_holds_no_more_than_its_largest_op(codecs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What drives operands from the caches is memory, too: it is within what the largest op takes."""
    took: list[tuple[int, int]] = []
    timed = profile._time

    def time(run: Callable[..., Any], inputs: list[Any], device: torch.device, others: Tensor | None) -> int:
        with Meter(device) as meter, meter.region():
            outputs = run(*inputs)
        del outputs
        took.append((_bytes(inputs) + meter.readings[0].peak_bytes, 0 if others is None else others.numel()))
        return timed(run, inputs, device, others)

    monkeypatch.setattr(profile, "_time", time)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(65536, 10)]
    graphplan.optimize(nn.Sequential(*body), "100%", torch.randn(8, 3, 128, 128), codecs=codecs)
    assert any(others for _, others in took)
    assert max(own + others for own, others in took) <= max(own for own, _ in took)
