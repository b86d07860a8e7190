"""profile: run each distinct instruction alone and read its time and scratch memory.

Instructions run on made-up tensors of the captured shapes, one at a time, so profiling never needs more memory
than the largest single op, and never touches the user's tensors, buffers, gradients or RNG stream. On a CPU they are
timed as a planned step runs them: over what they read where that dies, on pages that are there, with operands that
other ops have driven from the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Any

import torch
from torch import Tensor, fx

from graphplan.device import Device, Sample, sample_key
from graphplan.functions.register import NAMESPACE
from graphplan.graph import Graph, GraphOp, target_text
from graphplan.heap import Room
from graphplan.in_place import saved_in, written_over
from graphplan.instructions import Instruction, Instructions
from graphplan.meter import Meter, Reading
from graphplan.passes import made_up
from graphplan.telling import Values, telling_values, with_values
from graphplan.timing import LEAST_BYTES, Call, Python, median_ns, other_memory, python_of

Progress = Callable[[str, int, int], None]
BEFORE = 8  # ops, of which the longest says how much of a codec's code is left in the caches


@dataclass(frozen=True, slots=True)
class Profile:
    """`cost_ns[i]` and `workspace_bytes[i]` belong to instruction i; `measured` is False where any was estimated."""

    cost_ns: tuple[int, ...]
    workspace_bytes: tuple[int, ...]
    measured: bool


def profile(
    graph: Graph,
    instructions: Instructions,
    device: Device,
    *,
    run: bool = True,
    progress: Progress | None = None,
) -> Profile:
    """Return the Profile of `instructions`, measuring on this machine what `device` does not hold yet.

    With `run=False` nothing is executed: `device` describes another machine and missing samples are estimated.
    So is an op that refuses to run on made-up values; `measured` is then False.
    """
    saved = saved_in(graph)
    probes = [_probe(graph, instructions, item, saved) for item in instructions.items]
    joint = instructions.joint()  # `lower` adds up what these cost
    alone = ((i, item) for i, item in enumerate(instructions.items) if item.beyond and i not in joint)
    extra = {i: _beyond(graph, instructions, item) for i, item in alone}
    every = (*(p for p in probes if p is not None), *extra.values())
    missing = {p.key: p for p in every if p.key not in device.samples}
    if run and missing:
        where = _device_of(graph)
        held = {p.key: p for p in every if p.key in device.samples and not p.functions}
        beside = {k: p.call(p.touched_bytes + device.samples[k].workspace_bytes, where) for k, p in held.items()}
        ops = {k: (device.samples[k].cost_ns, call) for k, call in beside.items()}
        before = _before(instructions, probes, extra)
        device.samples.update(_measure(list(missing.values()), ops, before, where, progress))
        _add_up(graph, instructions, device, probes, {i: p for i, p in extra.items() if _key(probes[i]) in missing})
    samples = [None if p is None else _sample(graph, instructions, device, probes, i) for i, p in enumerate(probes)]
    known = all(p is None or p.key in device.samples for p in probes)
    return Profile(
        tuple(s.cost_ns if s else 0 for s in samples),
        tuple(s.workspace_bytes if s else 0 for s in samples),
        known,
    )


def _add_up(
    graph: Graph, instructions: Instructions, device: Device, probes: Sequence[_Probe | None], extra: dict[int, _Probe]
) -> None:
    """Price instructions that do something beyond their op: both times, each measured alone."""
    for i, beyond in extra.items():
        item, own = instructions.items[i], _key(probes[i])
        assert item.op is not None
        op = _key(probes[instructions.place(item.op)])
        parts = [device.samples.get(k) for k in (own, op, beyond.key)]
        if all(parts):
            whole, alone, more = (p for p in parts if p is not None)
            device.samples[own] = replace(whole, cost_ns=alone.cost_ns + more.cost_ns)


def _sample(
    graph: Graph, instructions: Instructions, device: Device, probes: Sequence[_Probe | None], i: int
) -> Sample:
    """Return what is known of an instruction, else an estimate.

    One that stands in for an op is estimated as that op, and what the op reads made anew beside it.
    """
    probe, item = probes[i], instructions.items[i]
    assert probe is not None
    if probe.key in device.samples:
        return device.samples[probe.key]
    if item.op is None or item.kind == "op":
        return device.estimate(probe.target, probe.touched_bytes)
    own = instructions.place(item.op)
    op, reads = _sample(graph, instructions, device, probes, own), instructions.items[own].reads
    made = sum(graph.storages[s].nbytes for s in reads if s not in item.reads)
    more = device.estimate("decode", made).cost_ns if made else 0
    return replace(op, cost_ns=op.cost_ns + more, workspace_bytes=op.workspace_bytes + made)


def _beyond(graph: Graph, instructions: Instructions, item: Instruction) -> _Probe:
    assert item.beyond is not None
    probe = _probe(graph, instructions, replace(item, kind="decode", op=None, emit=item.beyond, writes=()))
    assert probe is not None
    return probe


def _key(probe: _Probe | None) -> str:
    return "" if probe is None else probe.key


@dataclass(frozen=True, slots=True, eq=False)
class _Probe:
    """One instruction as a small graph of its own; `over`: that of the form which writes over what it reads.

    `dies`: what it could write over is always free to be.
    """

    module: fx.GraphModule
    over: fx.GraphModule | None
    dies: bool
    inputs: tuple[Any, ...]  # fake or meta tensors that say the shapes; an optimizer's state and settings as dicts
    written_bytes: int
    target: str
    key: str
    timed: bool  # False: its parts are

    @property
    def usual(self) -> fx.GraphModule:
        """The form that is timed."""
        return self.over if self.dies and self.over is not None else self.module

    @property
    def touched_bytes(self) -> int:
        tensors = (t for v in self.inputs for t in (v.values() if isinstance(v, dict) else (v,)))
        return self.written_bytes + sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    @property
    def functions(self) -> int:
        """How many of graphplan's functions it calls: Python, where ATen's ops are not."""
        ops = (n.target for n in self.module.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
        return sum(op.namespace == NAMESPACE for op in ops)

    def call(self, own_bytes: int, device: torch.device) -> Call:
        return Call(self.usual, lambda: [made_up(t, device) for t in self.inputs], own_bytes)


class _Isolated:
    """An Emitter that makes every value that is loaded an input, and every value that is stored an output."""

    def __init__(self, graph: Graph, instructions: Instructions, over: tuple[GraphOp, int] | None = None) -> None:
        self.source, self.graph, self.over = graph, fx.Graph(), over
        self.encoded = {e.id: e for e in instructions.encoded}
        self.inputs: dict[Any, tuple[fx.Node, Any]] = {}
        self.outputs: list[fx.Node] = []

    @property
    def takes_over(self) -> bool:
        return self.over is not None

    def load(self, node: fx.Node) -> fx.Node:
        return self._input(node, node.meta["val"])

    def load_encoded(self, storage: int) -> fx.Node:
        return self._input(storage, self.encoded[storage].like)

    def call(
        self, target: Callable[..., Any], args: tuple[Any, ...], name: str, kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def key(self) -> int:
        return 0

    def copy(self, node: fx.Node, name: str) -> fx.Node:
        if self.over is None or self.over[0].node is not node:
            return self.graph.node_copy(node, self.load)
        args, kwargs = fx.map_arg(node.args, self.load), fx.map_arg(node.kwargs, self.load)
        return self.graph.call_function(*written_over(self.source, *self.over, args, kwargs))

    def store(self, node: fx.Node, value: fx.Node) -> None:
        self.outputs.append(value)

    def store_encoded(self, storage: int, value: fx.Node) -> None:
        self.outputs.append(value)

    def _input(self, key: Any, val: Any) -> fx.Node:
        if key not in self.inputs:
            # Placeholders must stand first: made here, moved by `_probe`.
            self.inputs[key] = (self.graph.placeholder(f"x{len(self.inputs)}"), val)
        return self.inputs[key][0]


def _probe(
    graph: Graph, instructions: Instructions, item: Instruction, saved: frozenset[int] = frozenset()
) -> _Probe | None:
    if item.kind in ("buffers", "turn", "end"):
        return None
    out = _isolated(graph, instructions, item)
    over = None if item.takes_over is None or item.op is None else (graph.ops[item.op], item.takes_over)
    in_place = None if over is None else _isolated(graph, instructions, item, over)
    dies = item.takes_over not in saved
    inputs = tuple(t for _, t in out.inputs.values())
    sizes = {e.id: e.nbytes for e in instructions.encoded}
    written = sum(sizes[s] if s in sizes else graph.storages[s].nbytes for s in item.writes)
    body = [(n.op, target_text(n.target), str(n.args), str(n.kwargs)) for n in _renamed(out.graph)]
    shapes = [_described(v) for v in inputs]
    target = item.kind if item.op is None else f"{graph.ops[item.op].target}:{item.kind}"
    device = _device_of(graph)
    text = f"{body}|{shapes}|{written}|{device.type}" + ("" if over is None else "|over" if dies else "|beside")
    return _Probe(
        fx.GraphModule({}, out.graph),
        None if in_place is None else fx.GraphModule({}, in_place.graph),
        dies,
        inputs,
        written,
        target,
        sample_key(text),
        item.beyond is None or item.op is None,
    )


def _isolated(
    graph: Graph, instructions: Instructions, item: Instruction, over: tuple[GraphOp, int] | None = None
) -> _Isolated:
    out = _Isolated(graph, instructions, over)
    item.emit(out)
    first = next(iter(out.graph.nodes))
    for node in reversed([n for n, _ in out.inputs.values()]):
        if node is not first:
            first.prepend(node)
            first = node
    out.graph.output(tuple(out.outputs))
    return out


def _renamed(graph: fx.Graph) -> list[fx.Node]:
    """Number the nodes, so that equal work has equal text."""
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        if node.op == "call_function":
            node._rename(f"n{i}")
    return nodes


def _device_of(graph: Graph) -> torch.device:
    for node in graph.module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")


def _before(
    instructions: Instructions, probes: Sequence[_Probe | None], extra: dict[int, _Probe]
) -> dict[str, list[tuple[str, ...]]]:
    """Return the keys of the ops that run before each place where a codec's function may be called, by its key.

    What encodes a storage stands behind its last use in the forward, what decodes it before its first in the backward,
    and what runs for an op, and what it does beyond it, in the op's place.
    """
    at = {i: n for n, i in enumerate(instructions.program)}
    last, first = dict[int, int](), dict[int, int]()
    for i, n in at.items():
        item = instructions.items[i]
        for s in (*item.reads, *item.writes):
            if n <= instructions.turn:
                last[s] = n + 1
            else:
                first.setdefault(s, n)
    found: dict[str, list[tuple[str, ...]]] = {}
    for i, probe in (*enumerate(probes), *extra.items()):
        if probe is None or not probe.functions:
            continue
        item = instructions.items[i]
        if item.op is not None:
            n = at[instructions.place(item.op)]
        elif item.kind == "encode":
            n = max((last.get(s, 0) for s in item.reads), default=0)
        else:
            n = min((first[s] for s in item.writes if s in first), default=instructions.turn)
        keys = (_key(probes[p]) for p in instructions.program[max(0, n - BEFORE) : n])
        found.setdefault(probe.key, []).append(tuple(keys))
    return found


def _measure(
    probes: Sequence[_Probe],
    known: dict[str, tuple[int, Call]],
    before: dict[str, list[tuple[str, ...]]],
    device: torch.device,
    progress: Progress | None,
) -> dict[str, Sample]:
    """Return a Sample for every probe that runs on made-up values; the others are left to be estimated."""
    total = 2 * len(probes)
    samples: dict[str, Sample] = {}
    ran: list[tuple[_Probe, bool, bool]] = []  # as `_scratch` says
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.no_grad(), torch._C._DisableAutocast():
        with Meter(device) as meter:
            for i, probe in enumerate(probes):
                for form in (f for f in (probe.module, probe.over) if f is not None):
                    for values in ({}, *telling_values(form)):
                        refused = not _runs(probe, form, values, meter, device)
                        ran.append((probe, form is probe.over, refused))
                if progress:
                    progress("memory of each op", i + 1, total)
        scratch = _scratch(ran, meter.readings)
        own = {p.key: p.touched_bytes + scratch[p.key] for p in probes if p.key in scratch}
        for i, (probe, cost_ns) in enumerate(_timed([p for p in probes if p.key in own], own, known, before, device)):
            samples[probe.key] = Sample(probe.target, probe.touched_bytes, cost_ns, scratch[probe.key])
            if progress:
                progress("time of each op", len(probes) + i + 1, total)
    return samples


def _timed(
    probes: Sequence[_Probe],
    own: dict[str, int],
    known: dict[str, tuple[int, Call]],
    before: dict[str, list[tuple[str, ...]]],
    device: torch.device,
) -> Iterator[tuple[_Probe, int]]:
    """Yield each probe and the median ns of a run; `own` are the bytes that each takes.

    `known` are other ops with their ns, and `before` says which ops run before calls into Python.
    """
    largest, room = max(own.values(), default=0), Room()
    # With room for it once, holes between what is held leave some runs without: they fault again.
    room.hold(2 * largest if device.type == "cpu" else 0)
    calls, ops = {p.key: p.call(own[p.key], device) for p in probes}, dict(known)
    python: Python | None = None
    for probe in sorted(probes, key=lambda p: (p.functions > 0, own[p.key])):
        call = calls[probe.key]
        if not probe.timed:
            yield probe, 0
            continue
        if probe.functions and python is None:
            python = python_of(call, list(ops.values()), largest, device)  # the smallest call of a codec's function
        inputs, cold = call.values(), probe.touched_bytes >= LEAST_BYTES
        memory = other_memory(largest - call.own_bytes, device) if cold else None
        cost_ns = median_ns(call.run, inputs, device, memory, room=room)
        del inputs, memory
        if python is None:
            ops[probe.key] = (cost_ns, call)
        else:
            places = [max((ops[k][0] for k in keys if k in ops), default=0) for keys in before[probe.key]]
            cost_ns += probe.functions * python.beyond(median_low(places), cold=cold)
        yield probe, cost_ns
    room.release()


def _scratch(ran: Sequence[tuple[_Probe, bool, bool]], readings: Sequence[Reading]) -> dict[str, int]:
    """Return the most that each probe holds beside what it reads and writes, of (probe, in place?, refused?) by region.

    A region that raised has a reading, too, of no use; its probe is left out. An op of ATen's holds no more in place,
    what a codec's function holds there counts.
    """
    found: dict[str, int] = {}
    for (probe, over, _), reading in zip(ran, readings, strict=True):
        if over and probe.target.endswith(":op"):
            continue
        own = reading.peak_bytes - (0 if over else probe.written_bytes)
        found[probe.key] = max(0, own, found.get(probe.key, 0))
    refusing = {p.key for p, _, refused in ran if refused}
    return {key: most for key, most in found.items() if key not in refusing}


def _runs(probe: _Probe, form: fx.GraphModule, values: Values, meter: Meter, device: torch.device) -> bool:
    """Run a form of `probe` metered; False where the op refuses made-up values (a factorisation, an index check)."""
    inputs = with_values([made_up(t, device) for t in probe.inputs], values)
    try:
        if not probe.target.endswith(":op"):
            form(*inputs)  # the codecs' functions make small tables when they first run, and keep them
        with meter.region():
            outputs = form(*inputs)
    except (RuntimeError, IndexError, ValueError):
        return False
    del outputs
    return True


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), str(value.dtype))
    return {k: _described(v) for k, v in value.items()} if isinstance(value, dict) else value
