"""The meter: bytes in use, from the allocator's own events, matched by pointer.

Summing a profiler's memory events goes wrong in a process that has been profiled before: frees of memory that was
never counted are reported too. So a free counts only when its allocation was seen.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "graphplan::region_"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one region did to memory, above what was in use when it began."""

    peak_bytes: int
    end_bytes: int
    timeline: tuple[tuple[int, int], ...] = ()  # (ns since the region began, bytes in use)


class Meter:
    """Reads the peak of the regions run inside `with meter:`; results in `meter.readings` afterwards."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.readings: list[Reading] = []
        self._profile: Any = None
        self._count = 0

    def __enter__(self) -> Meter:
        """Start watching the allocator."""
        if self.device.type == "cpu":
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            with _without_notices():
                self._profile.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop, and read the regions off the event tree."""
        if self._profile is None:
            return
        with _without_notices():
            self._profile.__exit__(*exc)
        if exc[0] is None:
            tree = self._profile.profiler.kineto_results.experimental_event_tree()
            self.readings = _read_regions(tree, self._count)
        self._profile = None

    @contextlib.contextmanager
    def region(self) -> Iterator[None]:
        """Measure what runs inside as one reading."""
        if self.device.type != "cpu":
            with self._cuda_region():
                yield
            return
        self._count += 1
        with record_function(f"{_MARK}{self._count - 1}"):
            yield

    @contextlib.contextmanager
    def _cuda_region(self) -> Iterator[None]:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_stats(self.device)["requested_bytes.all.current"]
        yield
        torch.cuda.synchronize(self.device)
        stats = torch.cuda.memory_stats(self.device)
        peak, now = stats["requested_bytes.all.peak"], stats["requested_bytes.all.current"]
        self.readings.append(Reading(peak - before, now - before))


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Drop the `USDT:` lines that kineto writes on descriptor 2 when it starts and stops; pass on all else."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught:
                if not line.startswith(b"USDT:"):
                    os.write(2, line)


def peak_of(run: Callable[[], object], device: torch.device) -> Reading:
    """Return the Reading of one call of `run`; its result is held until the region ends, then dropped."""
    with Meter(device) as meter:
        with meter.region():
            result = run()
        del result
    return meter.readings[0]


def _read_regions(tree: Iterable[Any], count: int) -> list[Reading]:
    regions: dict[int, list[tuple[int, int, int]]] = {i: [] for i in range(count)}
    spans: dict[int, tuple[int, int]] = {}
    events: list[tuple[int, int, int]] = []
    stack: list[Any] = list(tree)
    while stack:
        event = stack.pop()
        if event.typed[0] is _EventType.Allocation or event.typed[0] == _EventType.Allocation:
            fields = event.extra_fields
            if fields.device.type == "cpu":
                events.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.name.startswith(_MARK):
            spans[int(event.name.removeprefix(_MARK))] = (event.start_time_ns, event.end_time_ns)
        stack.extend(event.children)
    # Events of other threads stand in trees of their own: regions are cut by time, not by parent.
    events.sort(key=lambda e: e[0])
    ordered = sorted(spans.items(), key=lambda item: item[1])
    position = 0
    for index, (start, end) in ordered:
        while position < len(events) and events[position][0] < start:
            position += 1
        while position < len(events) and events[position][0] <= end:
            regions[index].append(events[position])
            position += 1
    return [_replay(regions[i], spans[i][0]) for i in range(count)]


def _replay(events: Iterable[tuple[int, int, int]], start_ns: int) -> Reading:
    live: dict[int, int] = {}
    level = peak = 0
    timeline: list[tuple[int, int]] = []
    for time_ns, ptr, size in events:
        if size > 0:
            level += size - live.pop(ptr, 0)
            live[ptr] = size
        elif ptr in live:
            level -= live.pop(ptr)
        else:
            continue
        peak = max(peak, level)
        timeline.append((time_ns - start_ns, level))
    return Reading(peak, level, tuple(timeline))
