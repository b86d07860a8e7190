"""Starting points: keep what crosses a few narrow places of the forward, drop all that lies between them.

Checkpointing by segments (Chen et al. 2016) for graphs that are no chain: a place between two ops is as wide as the
bytes that are written before it and read after it in the forward, and what crosses it is all that a restart there
needs. A search by single flips reaches such a plan of a long recurrent graph only after thousands of them.

Others encode everything, but for what a first part of the forward writes, which is recomputed from such checkpoints:
its codes would be held longest, and are there when most gradients are. From everything kept, flips to codes look dear
beside recomputes where one code frees little, and noise that was spent on the first ones is missing for the last.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from solvers.evaluate import Fates, allowed, keep_everything, profiles
from solvers.fates import value_spans
from solvers.moves import DROP, KEEP
from solvers.units import Int64, Units

Floats = NDArray[np.float64]

PARTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # of the forward, recomputed where the rest is encoded
BISECTIONS = 60  # of a price
COUNTS = 40  # numbers of segments tried at most
WINDOW = 0.4  # of a segment's bytes, to both sides of its even end: where the narrowest place is looked for


def checkpointed(units: Units) -> Fates:
    """Return plans [plan, unit]: everything kept, then from two segments to one for every second unit."""
    kept = keep_everything(units)
    droppable = [a for a, u in enumerate(units.units) if len(u.fates) > 1 and u.fates[DROP].name == "drop"]
    free = np.array(droppable, np.int64)
    if not droppable:
        return kept[None, :]
    write, last = _lives(units, free)
    size = np.array([units.units[a].size_bytes for a in free], np.int64)
    change, written = np.zeros(len(units.problem.program), np.int64), np.zeros(len(units.problem.program), np.int64)
    np.add.at(change, write, size)
    np.add.at(change, last, -size)
    np.add.at(written, write, size)
    width, passed = np.cumsum(change), np.cumsum(written)
    plans = [kept]
    for count in sorted({round(c) for c in np.geomspace(2, max(2, len(free) / 2), COUNTS)}):
        places = _narrow(width, passed, count)
        first = np.searchsorted(places, write)  # the first place at or after the write
        crosses = np.append(places, len(change))[first] < last
        plan = kept.copy()
        plan[free] = np.where(crosses, KEEP, DROP)
        plans.append(plan)
    return np.stack(plans)


def encoded(units: Units) -> Fates:
    """Return plans [plan, unit]: all encoded, then all but what PARTS of the forward write; none without codecs."""
    kept = keep_everything(units)
    most = max((len(u.fates) for u in units.units), default=0)
    gain, noise = np.full((len(kept), most), -np.inf), np.zeros((len(kept), most))
    for a, unit in enumerate(units.units):
        for m, fate in enumerate(unit.fates):
            noise[a, m] = fate.noise_ppb
            if fate.encode is not None:
                gain[a, m] = sum(h.size_bytes for h in fate.held if h.dropped) - fate.encoded_bytes
    if not np.isfinite(gain).any():
        return kept[None, :][:0]
    checkpoints = checkpointed(units)
    low = checkpoints[np.argmin(profiles(units, checkpoints).peak_bytes())]
    last = np.array([min((h.last_forward for h in u.fates[KEEP].held), default=0) for u in units.units])
    plans = []
    for part in PARTS:
        rest = last >= part * units.problem.turn
        own = np.where(rest[:, None], gain, -np.inf)
        own[np.arange(len(kept)), kept] = 0.0
        plans.append(allowed(units, np.where(rest, _coded(own, noise, units.problem.noise_limit_ppb), low)))
    return np.stack(plans).astype(kept.dtype)


def _coded(gain: Floats, noise: Floats, limit: int) -> Int64:
    """Return each unit's fate of most gain [unit, fate] less its noise at a price, the lowest that keeps the limit."""
    low, high, each = 0.0, max(0.0, float(gain.max())), np.arange(len(gain))
    found: Int64 = np.argmax(gain - high * noise, axis=1)  # without noise
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        chosen = np.argmax(gain - price * noise, axis=1)
        if noise[each, chosen].sum() <= limit:
            high, found = price, chosen
        else:
            low = price
    return found


def _lives(units: Units, free: Int64) -> tuple[Int64, Int64]:
    """Return the first write and the last forward read of each unit."""
    spans = value_spans(units.problem)
    write = [min(spans[v].write for v in units.units[a].values) for a in free]
    last = [max(h.last_forward for h in units.units[a].fates[KEEP].held) for a in free]
    return np.array(write, np.int64), np.array(last, np.int64)


def _narrow(width: Int64, passed: Int64, count: int) -> Int64:
    """Return the positions after which segments end: near even shares of the bytes, where fewest cross."""
    segment = passed[-1] / count
    ends = segment * np.arange(1, count)
    low = np.searchsorted(passed, ends - WINDOW * segment)
    high = np.maximum(low + 1, np.searchsorted(passed, ends + WINDOW * segment))
    return np.unique([a + int(np.argmin(width[a:b])) for a, b in zip(low, high, strict=True)])
