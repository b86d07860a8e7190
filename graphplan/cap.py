"""A cap that the operating system keeps: a limit on this process's data segment (Linux)."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
_UNTOLD = "could not create a primitive"  # oneDNN, of its own memory
_REFUSALS = (
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "bad allocation",
    "out of memory",
    _UNTOLD,
)


_LEFT_FREE = 8 * 2**20  # of the heap: for what is no tensor, and for tensors' rounding to pages
_LARGEST, _SMALLEST = 60 << 10, 512  # blocks that hold what is free in the heap; larger ones would be mappings


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
        _return_free_memory()
        if self.allowance_bytes is not None:
            self._held = _hold_free_heap()
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
        for block in self._held:
            _libc().free(block)
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


class _HeapInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def _libc() -> Any:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    if hasattr(library, "mallinfo2"):
        library.mallinfo2.restype = _HeapInfo
    return library


def _return_free_memory() -> None:
    """Give freed heap pages back."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def _hold_free_heap() -> list[int]:
    """Allocate what is free in the heap but for _LEFT_FREE, without making it larger; return the blocks."""
    library, held, size = _libc(), [], _LARGEST
    if not hasattr(library, "mallinfo2"):
        return []
    before = library.mallinfo2()
    while size >= _SMALLEST and before.fordblks > _LEFT_FREE:
        block = library.malloc(size)
        after = library.mallinfo2()
        if after.arena > before.arena:
            library.free(block)
            library.malloc_trim(0)
            after, size = library.mallinfo2(), size // 2
        else:
            held.append(block)
        before = after
    return held


def start_threads() -> None:
    """Start torch's threads now: their stacks count as data, and are no tensor memory."""
    x = torch.ones(4, 3, 256, 256, requires_grad=True)
    F.conv2d(x, torch.ones(4, 3, 3, 3)).sum().backward()  # type: ignore[no-untyped-call]


def tune_malloc() -> bool:
    """Make glibc give freed tensors back at once, so that a plan's saving is the process's too; False elsewhere.

    Every block of 64 KiB or more gets pages of its own, and the top of the heap is trimmed.
    """
    option: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    return option is not None and bool(option(_MMAP_THRESHOLD, 64 * 1024)) and bool(option(_TRIM_THRESHOLD, 0))
