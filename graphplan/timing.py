"""How long one call takes in a planned step: what it reads, and its code, have left a CPU's caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

MIN_RUNS = 3
MAX_RUNS = 15
ENOUGH_NS = 2_000_000  # more runs than MIN_RUNS only while they are cheap
CACHE_BYTES = 64 << 20  # written between runs, so that operands are no longer in a CPU's caches
LEAST_BYTES = 1 << 20  # touched by a call, or it is timed warm
Before = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Call:
    """What is run on which values; `own_bytes` is all that it reads, writes and holds."""

    run: Callable[..., Any]
    values: Callable[[], list[Any]]
    own_bytes: int


def median_ns(run: Callable[..., Any], inputs: list[Any], device: torch.device, before: Before | None = None) -> int:
    """Return the median ns of one call, each right after a call of `before`."""
    sync: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    run(*inputs)
    times: list[int] = []
    while len(times) < MIN_RUNS or (len(times) < MAX_RUNS and sum(times) < ENOUGH_NS):
        if before is not None:
            before()
        sync()
        start = time.perf_counter_ns()
        outputs = run(*inputs)
        sync()
        times.append(time.perf_counter_ns() - start)
        del outputs
    return sorted(times)[len(times) // 2]


def other_memory(spare_bytes: int, device: torch.device) -> Before | None:
    """Return what writes memory that drives operands from the caches: no more than `spare_bytes`; None for too few."""
    nbytes = min(CACHE_BYTES, spare_bytes)
    if device.type != "cpu" or nbytes < LEAST_BYTES:
        return None
    return partial(torch.empty(nbytes, dtype=torch.uint8).fill_, 1)


def python_ns(call: Call, ops: Sequence[Call], largest_bytes: int, device: torch.device) -> tuple[int, int]:
    """Return what a call into Python takes in a step beyond its time behind other memory, and beyond its time warm.

    A step's other ops drive its code from the caches, too, which a write of memory does not. Seen of one such `call`, a
    small one, behind the largest of `ops` that `largest_bytes` have room for beside it. (0, 0) where there is none.
    """
    spare = largest_bytes - call.own_bytes
    fitting = [op for op in ops if op.own_bytes <= spare]
    if device.type != "cpu" or not fitting:
        return 0, 0
    op, inputs = max(fitting, key=lambda o: o.own_bytes), call.values()
    behind = median_ns(call.run, inputs, device, partial(op.run, *op.values()))
    cold = median_ns(call.run, inputs, device, other_memory(spare, device))
    warm = median_ns(call.run, inputs, device)
    return max(0, behind - cold), max(0, behind - warm)
