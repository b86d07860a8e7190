"""How long one call takes in a planned step: what it reads, and its code, have left a CPU's caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from graphplan.heap import Room, page_faults

MIN_RUNS = 3
MAX_RUNS = 15
PYTHON_RUNS = 7  # behind each of some ops, of which the slowest take longer than all else
ENOUGH_NS = 2_000_000  # more runs than MIN_RUNS only while they are cheap
FEW_FAULTS = 64  # in a run on pages that are there
MOST_FAULTY = 8  # runs that do not count: glibc puts each result behind the one before, until the room has its pages
CACHE_BYTES = 64 << 20  # written between runs, so that operands are no longer in a CPU's caches
LEAST_BYTES = 1 << 20  # touched by a call, or it is timed warm
Before = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Call:
    """What is run on which values; `own_bytes` is all that it reads, writes and holds."""

    run: Callable[..., Any]
    values: Callable[[], list[Any]]
    own_bytes: int


def median_ns(
    run: Callable[..., Any],
    inputs: list[Any],
    device: torch.device,
    before: Before | None = None,
    most_runs: int = MAX_RUNS,
    room: Room | None = None,
) -> int:
    """Return the median ns of one call, each right after a call of `before`.

    With a `room` that is held, runs that fault pages in do not count.
    """
    faulty = 0 if room is not None and room.nbytes else MOST_FAULTY
    sync: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    run(*inputs)
    times: list[int] = []
    while len(times) < MIN_RUNS or (len(times) < most_runs and sum(times) < ENOUGH_NS):
        if before is not None:
            before()
        sync()
        faults, start = page_faults(), time.perf_counter_ns()
        outputs = run(*inputs)
        sync()
        taken = time.perf_counter_ns() - start
        del outputs
        if faulty < MOST_FAULTY and page_faults() - faults > FEW_FAULTS:
            faulty += 1
        else:
            times.append(taken)
    return sorted(times)[len(times) // 2]


def other_memory(spare_bytes: int, device: torch.device) -> Before | None:
    """Return what writes memory that drives operands from the caches: no more than `spare_bytes`; None for too few."""
    nbytes = min(CACHE_BYTES, spare_bytes)
    if device.type != "cpu" or nbytes < LEAST_BYTES:
        return None
    return partial(torch.empty(nbytes, dtype=torch.uint8).fill_, 1)


@dataclass(frozen=True, slots=True)
class Python:
    """What a call into Python takes in a step beyond its time alone.

    A step's other ops drive its code from the caches, too, which a write of memory does not. Seen of one small call:
    its ns `cold`, behind other memory, and `warm`, and `behind` ops that take up to 2^n ns, by n.
    """

    cold: int = 0
    warm: int = 0
    behind: tuple[tuple[int, int], ...] = ()

    def beyond(self, before_ns: int, *, cold: bool) -> int:
        """Return the ns beyond its time, taken cold or warm, of a call behind an op of `before_ns`."""
        known = [ns for n, ns in self.behind if n <= before_ns.bit_length()]
        return max(0, max(known, default=0) - (self.cold if cold else self.warm))


def python_of(call: Call, ops: Sequence[tuple[int, Call]], largest_bytes: int, device: torch.device) -> Python:
    """Return what one small `call` says of Python, behind those of `ops`, with their ns, that fit beside it.

    Together they take no more than `largest_bytes`. Of ops that take about as long, the largest is run.
    """
    spare, inputs = largest_bytes - call.own_bytes, call.values()
    fitting: dict[int, Call] = {}
    for ns, op in ops if device.type == "cpu" else ():
        n = ns.bit_length()
        if op.own_bytes <= spare and (n not in fitting or op.own_bytes > fitting[n].own_bytes):
            fitting[n] = op
    if not fitting:
        return Python()
    behind = [
        (n, median_ns(call.run, inputs, device, partial(op.run, *op.values()), PYTHON_RUNS))
        for n, op in sorted(fitting.items())
    ]
    cold = median_ns(call.run, inputs, device, other_memory(spare, device))
    return Python(cold, median_ns(call.run, inputs, device), tuple(behind))
