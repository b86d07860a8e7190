"""Profiling: what it holds while it times an op, and where."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphplan
from graphplan import profile, timing
from graphplan.capture import capture
from graphplan.codecs import choose_codecs
from graphplan.heap import Room
from graphplan.in_place import saved_in
from graphplan.instructions import instructions_of
from graphplan.meter import Meter
from graphplan.passes import made_up


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
    metered: list[tuple[Any, list[Any]]] = []
    beside: dict[str, list[int]] = {"memory": [], "ops": []}
    timed = timing.median_ns

    def median_ns(
        run: Any, inputs: list[Any], device: torch.device, before: Any = None, *runs: int, **more: Any
    ) -> int:
        own = _peak(run, inputs, device)
        if before is not None:
            filled = getattr(before.func, "__self__", None)
            held = _bytes([filled, *before.args])
            kind = "memory" if isinstance(filled, Tensor) else "ops"
            beside[kind].append(_bytes(inputs) + held + max(own, _peak(before, (), device)))
        return timed(run, inputs, device, before, *runs, **more)

    runs = profile._runs

    def noted(probe: Any, form: Any, *rest: Any) -> bool:
        metered.append((form, probe.inputs))
        return runs(probe, form, *rest)

    monkeypatch.setattr(profile, "_runs", noted)
    for module in (profile, timing):
        monkeypatch.setattr(module, "median_ns", median_ns)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(65536, 10)]
    graphplan.optimize(nn.Sequential(*body), "100%", torch.randn(8, 3, 128, 128), codecs=codecs)
    cpu = torch.device("cpu")
    made = [(form, [made_up(t, cpu) for t in inputs]) for form, inputs in metered]
    alone = [_bytes(inputs) + _peak(form, inputs, cpu) for form, inputs in made]
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


def test_an_op_is_timed_in_the_form_that_steps_run() -> None:
    """Over its operand, unless a plan may keep it: a ReLU over what no backward reads, not a SiLU over its input."""
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.SiLU())
    graph = capture(model, (torch.randn(64, 64),)).graph
    instructions = instructions_of(graph, choose_codecs("exact"))
    probes = [profile._probe(graph, instructions, item, saved_in(graph)) for item in instructions.items]
    usual = {p.target: p.usual is p.over for p in probes if p is not None}
    over = {
        p.target: [n.target for n in p.usual.graph.nodes if n.op == "call_function"]
        for p in probes
        if p is not None and p.target.startswith(("aten.relu", "aten.silu."))
    }
    assert over["aten.relu.default:op"] == [torch.ops.aten.relu_.default]
    assert over["aten.silu.default:op"] == [torch.ops.aten.silu.default]
    assert usual["aten.threshold_backward.default:op"]
    assert usual["aten.threshold_backward.default:variant"]
    assert not usual["aten.mm.default:op"]


def test_made_up_floats_differ() -> None:
    """A max-pool of equal numbers is three times as fast as one of a model's. The user's RNG stream stays."""
    state, cpu = torch.random.get_rng_state(), torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        like = torch.empty_strided((4, 3, 200, 200), (120000, 1, 600, 3), dtype=dtype, device="meta")
        made = made_up(like, cpu)
        assert (made.dtype, made.stride()) == (dtype, like.stride())
        values = made.float()
        assert values.min() >= 0.5
        assert values.max() <= 1
        assert len(values.unique()) > 8
        assert values.equal(made_up(like, cpu).float())
    assert made_up(torch.empty(3, 1).expand(3, 5), cpu).stride() == (1, 0)
    assert not made_up(torch.ones(3, dtype=torch.int64), cpu).any()
    assert made_up(torch.empty(0), cpu).numel() == 0
    assert torch.random.get_rng_state().equal(state)


def test_runs_that_fault_pages_in_do_not_count() -> None:
    """Where the room's pages are not all there yet, a run is slower than any of a step's."""
    room, slow, cpu = Room(), 0.02, torch.device("cpu")
    room.hold(1 << 20)
    if not room.nbytes:
        pytest.skip("no room can be held here")

    def faulting(first: int) -> Callable[[], None]:
        runs = 0

        def run() -> None:
            nonlocal runs
            runs += 1
            if runs <= first:
                with mmap.mmap(-1, 1 << 20) as pages:
                    for at in range(0, len(pages), mmap.PAGESIZE):
                        pages[at] = 1
                time.sleep(slow)

        return run

    assert timing.median_ns(faulting(5), [], cpu, room=room) < slow * 1e9
    assert timing.median_ns(faulting(5), [], cpu) > slow * 1e9
    assert timing.median_ns(faulting(50), [], cpu, room=room) > slow * 1e9  # a step there may fault, too
