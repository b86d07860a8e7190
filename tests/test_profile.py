"""Profiling: what it holds while it times an op, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphplan
from graphplan import profile, timing
from graphplan.meter import Meter


def _bytes(values: Sequence[Any]) -> int:
    found = {v.data_ptr(): v.untyped_storage().nbytes() for v in values if isinstance(v, Tensor)}
    return sum(found.values())


def _peak(run: Callable[..., Any], inputs: Sequence[Any], device: torch.device) -> int:
    with Meter(device) as meter, meter.region():
        outputs = run(*inputs)
        del outputs
    return meter.readings[0].peak_bytes


@pytest.mark.parametrize("codecs", ["exact", "lossy"])
def test_profiling_holds_no_more_than_its_largest_op(codecs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What drives operands and code from the caches is memory, too: it is within what the largest op takes."""
    alone: list[int] = []
    beside: dict[str, list[int]] = {"memory": [], "ops": []}
    timed = timing.median_ns

    def median_ns(run: Any, inputs: list[Any], device: torch.device, before: Any = None) -> int:
        own = _peak(run, inputs, device)
        alone.append(_bytes(inputs) + own)
        if before is not None:
            filled = getattr(before.func, "__self__", None)
            held = _bytes([filled, *before.args])
            kind = "memory" if isinstance(filled, Tensor) else "ops"
            beside[kind].append(_bytes(inputs) + held + max(own, _peak(before, (), device)))
        return timed(run, inputs, device, before)

    for module in (profile, timing):
        monkeypatch.setattr(module, "median_ns", median_ns)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(65536, 10)]
    graphplan.optimize(nn.Sequential(*body), "100%", torch.randn(8, 3, 128, 128), codecs=codecs)
    assert beside["memory"]
    assert beside["ops"]
    assert max(*beside["memory"], *beside["ops"]) <= max(alone)


def test_a_call_into_python_is_timed_behind_the_largest_op_that_fits() -> None:
    """Not behind one that would not fit beside it; where none does, nothing is added."""
    ran: list[str] = []

    def call(name: str, nbytes: int) -> timing.Call:
        return timing.Call(lambda: ran.append(name), list, nbytes)

    codec, ops = call("codec", 10), [call("small", 50), call("fits", 90), call("large", 91)]
    cpu = torch.device("cpu")
    more = timing.python_ns(codec, ops, 100, cpu)
    assert set(ran) == {"codec", "fits"}
    assert min(more) >= 0
    assert timing.python_ns(codec, ops[2:], 100, cpu) == (0, 0)
