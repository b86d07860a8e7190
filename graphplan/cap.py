"""A cap that the operating system keeps: a limit on this process's data segment (Linux)."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from graphplan.heap import free_blocks, hold_free_heap, return_free_memory

_UNTOLD = "could not create a primitive"  # oneDNN, of its own memory
_REFUSALS = (
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "bad allocation",
    "out of memory",
    _UNTOLD,
)


class Cap:
    """A limit on the process's data segment from entering to leaving; holds what the OS refused.

    What was freed before and is still mapped would be memory beyond the allowance, a hundred megabytes after profiling:
    all but 8 MiB of it is held meanwhile (glibc).
    """

    def __init__(self, allowance_bytes: int | None) -> None:
        """Allow `allowance_bytes` above what is mapped when the cap is entered; None: set no limit."""
        self.allowance_bytes = allowance_bytes
        self.before_bytes = 0
        self.cap_bytes: int | None = None
        self.refusal: str | None = None
        self._held: list[int] = []

    def __enter__(self) -> Cap:
        """Set the soft limit."""
        gc.collect()
        return_free_memory()
        if self.allowance_bytes is not None:
            self._held = hold_free_heap()
        self.before_bytes = data_bytes()
        if self.allowance_bytes is not None:
            self.cap_bytes = self.before_bytes + self.allowance_bytes
            _limit_data(self.cap_bytes)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Lift the limit, so that there is memory to report with; a refused allocation is an answer."""
        if self.cap_bytes is None:
            return False
        _limit_data(None)
        free_blocks(self._held)
        if error is None or not is_refusal(error):
            return False
        said = (str(error).splitlines() or ["no memory"])[0].rpartition("err == 0. ")[2]
        self.refusal = f"{type(error).__name__}: {said}" + " (oneDNN was given no memory)" * (_UNTOLD in said)
        return True


def can_cap() -> bool:
    """Return whether RLIMIT_DATA limits anonymous memory here: Linux alone."""
    return sys.platform == "linux"


def is_refusal(error: BaseException) -> bool:
    """Return whether `error` says that the operating system gave no memory."""
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _REFUSALS)


def data_bytes() -> int:
    """Return the size of this process's data segment: what RLIMIT_DATA limits (Linux)."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def _limit_data(limit: int | None) -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard if limit is None else limit, hard))


def start_threads() -> None:
    """Start torch's threads now: their stacks count as data, and are no tensor memory."""
    x = torch.ones(4, 3, 256, 256, requires_grad=True)
    F.conv2d(x, torch.ones(4, 3, 3, 3)).sum().backward()  # type: ignore[no-untyped-call]
