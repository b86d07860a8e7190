"""Profiling: what it holds while it times an op, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphplan
from graphplan import profile, timing
from graphplan.capture import capture
from graphplan.codecs import choose_codecs
from graphplan.instructions import instructions_of
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

    def median_ns(run: Any, inputs: list[Any], device: torch.device, before: Any = None, *runs: int) -> int:
        own = _peak(run, inputs, device)
        alone.append(_bytes(inputs) + own)
        if before is not None:
            filled = getattr(before.func, "__self__", None)
            held = _bytes([filled, *before.args])
            kind = "memory" if isinstance(filled, Tensor) else "ops"
            beside[kind].append(_bytes(inputs) + held + max(own, _peak(before, (), device)))
        return timed(run, inputs, device, before, *runs)

    for module in (profile, timing):
        monkeypatch.setattr(module, "median_ns", median_ns)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(65536, 10)]
    graphplan.optimize(nn.Sequential(*body), "100%", torch.randn(8, 3, 128, 128), codecs=codecs)
    assert beside["memory"]
    assert beside["ops"]
    assert max(*beside["memory"], *beside["ops"]) <= max(alone)


def test_a_call_into_python_is_timed_behind_the_largest_ops_that_fit() -> None:
    """One of those that take about as long; not behind one that would not fit beside it."""
    ran: list[str] = []

    def call(name: str, nbytes: int) -> timing.Call:
        return timing.Call(lambda: ran.append(name), list, nbytes)

    codec = call("codec", 10)
    ops = [(70, call("small", 50)), (100, call("fits", 90)), (101, call("large", 91)), (900, call("long", 40))]
    cpu = torch.device("cpu")
    found = timing.python_of(codec, ops, 100, cpu)
    assert set(ran) == {"codec", "fits", "long"}
    assert [n for n, _ in found.behind] == [7, 10]
    assert timing.python_of(codec, ops[2:3], 100, cpu) == timing.Python()


def test_a_call_into_python_costs_what_it_does_behind_the_op_before_it() -> None:
    """Never less than behind a shorter one: what lies between two that were seen, as the shorter."""
    python = timing.Python(cold=50, warm=10, behind=((7, 60), (9, 55), (12, 200)))
    assert [python.beyond(ns, cold=True) for ns in (1, 100, 300, 2000, 3000, 1 << 40)] == [0, 10, 10, 10, 150, 150]
    assert python.beyond(100, cold=False) == 50
    assert timing.Python().beyond(100, cold=False) == 0


def test_what_runs_before_a_code_are_the_ops_before_its_place() -> None:
    """An encode stands behind the last forward reader, and what reads codes in the place of its op."""
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.Sigmoid())
    graph = capture(model, (torch.randn(64, 64),)).graph
    instructions = instructions_of(graph, choose_codecs("int8"))
    probes = [profile._probe(graph, instructions, item) for item in instructions.items]
    names = {p.key: p.target.removeprefix("aten.").split(".")[0] for p in probes if p is not None}
    before = profile._before(instructions, probes, {})
    found = {
        item.name: [names[k] for k in before[p.key][0] if k]
        for item, p in zip(instructions.items, probes, strict=True)
        if p is not None and p.functions
    }
    forward = ["addmm", "tanh", "addmm"]
    assert found == {
        "tanh__int8": forward,
        "mm_1__from_int8": [*forward, "sigmoid", "sigmoid_backward"],
        "tanh_backward__from_int8": [*forward[1:], "sigmoid", "sigmoid_backward", "mm", "mm", "sum"],
    }
