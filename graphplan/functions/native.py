"""Loops over elements for tensors on a CPU: `loops`, with tensors for arrays and torch's number of threads.

Where Numba is not installed, the environment says GRAPHPLAN_LOOPS=0, or a tensor is not what the loops are for, a
function here says so by None or False, and its caller does the same in plain torch and numpy. To load Numba and the
loops takes a second, and some 100 MB of the process.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

GREATER, NOT_LESS, EQUAL, BETWEEN = range(4)
Test = tuple[int, float, bool]  # of an element: which, of it or its negative, whether it is not to pass
GT, GE, EQ, INSIDE = (GREATER, 1.0, False), (NOT_LESS, 1.0, False), (EQUAL, 1.0, False), (BETWEEN, 1.0, False)
LT, LE, NE, NOT_LE = (GREATER, -1.0, False), (NOT_LESS, -1.0, False), (EQUAL, 1.0, True), (NOT_LESS, -1.0, True)
_LARGEST = float(np.finfo(np.float32).max)
_WORDS = {torch.bool: torch.uint8, torch.bfloat16: torch.uint16}
_LOCK = Lock()  # one of Numba's pools of threads must not be entered twice


@cache
def loops() -> dict[str, Any] | None:
    """Return the compiled loops; None without Numba, where they are not wanted, or where words are stored otherwise."""
    if sys.byteorder != "little" or os.environ.get("GRAPHPLAN_LOOPS") == "0":
        return None
    try:
        modules = [import_module(f"graphplan.functions.{name}") for name in ("loops", "slope_loops")]
    except ImportError:
        return None
    return {name: value for module in modules for name, value in vars(module).items()}


def serves(*tensors: Tensor) -> bool:
    """Return whether the loops work on these: float32 and bool on a CPU."""
    return loops() is not None and all(
        t.is_cpu and (t.dtype is torch.float32 or t.dtype is torch.bool) for t in tensors
    )


def run(name: str, *args: Any) -> None:
    """Call a loop with arrays for tensors, on as many threads as torch uses."""
    found = loops()
    assert found is not None
    numba = found["numba"]
    arrays = [array(a) if isinstance(a, Tensor) else a for a in args]
    with _LOCK:
        ours, before = torch.get_num_threads(), numba.get_num_threads()
        threads = min(ours, numba.config.NUMBA_NUM_THREADS)
        if threads != before:
            numba.set_num_threads(threads)
        try:
            found[name](*arrays)
        finally:
            if threads != before:
                numba.set_num_threads(before)
            # Numba starts its threads with a call of OpenMP's that sets the number of torch's, too.
            if torch.get_num_threads() != ours:
                torch.set_num_threads(ours)


def array(x: Tensor) -> Any:
    """Return the memory of a tensor as an array: bools as bytes, bfloat16 as words."""
    other = _WORDS.get(x.dtype)
    return (x if other is None else x.view(other)).numpy(force=x.requires_grad)


def line(x: Tensor) -> Any:
    """Return the elements of a tensor without gaps or overlap as they lie in memory, as an array (n,).

    What is cut up are arrays, not tensors: a torch function that has left the caches takes 10 to 50 us (DECISIONS 61).
    """
    found = array(x)
    if not found.flags.c_contiguous:
        found = array(torch.as_strided(x, (x.numel(),), (1,)))
    return found.reshape(-1)


def number(value: float) -> Any:
    """Return a constant in the loops' arithmetic."""
    if abs(value) <= _LARGEST:
        return np.float32(value)
    with np.errstate(over="ignore"):
        return np.float32(value)


def start_loops(lossy: bool = True) -> None:
    """Load what every loop needs, and compile what is not on disk: seconds, and memory that is not tensors'.

    Without `lossy`, only the loops of exact codecs.
    """
    if loops() is None:
        return
    x, byte, mask, one = torch.zeros(256), torch.zeros(256, dtype=torch.uint8), torch.zeros(256) > 0, torch.zeros(1)
    run("pack", x, GREATER, number(1), False, number(0), number(0), byte[:32])
    run("pack_bools", mask, byte[:32])
    run("unpack", byte[:32], mask)
    run("scale", byte, True, number(1), number(0), False, False, x, x, True)
    if not lossy:
        return
    run("encode", x, x, number(1), 8, byte, one, one)
    run("encode_slopes", x, 0, x, number(1), 8, byte, one, one)
    run("decode", byte, one, one, 8, x)
    run("decode_times", byte, one, one, 4, x, x, True)
    run("round_half", x.view(torch.uint32), x, torch.zeros(256, dtype=torch.bfloat16))
