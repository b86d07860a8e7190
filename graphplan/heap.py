"""glibc's heap: what of it is free, who may have it, whether it goes back to the system; elsewhere nothing is done."""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
_LEFT_FREE = 8 * 2**20  # of the heap: for what is no tensor, and for tensors' rounding to pages
_LARGEST, _SMALLEST = 60 << 10, 512  # blocks that hold what is free in the heap; larger ones would be mappings
_BLOCK = 16 << 20  # a room is made of; few, as the first page of each is written
_HOLES = 2  # addresses for each byte: where an aligned tensor lay, glibc cannot put the next one of its size


class _HeapInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


@cache
def _libc() -> Any:
    """Return the C library."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    if _tells():
        library.mallinfo2.restype = _HeapInfo
    return library


@cache
def _tells() -> bool:
    """Return whether it is a glibc that tells of its heap."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")


class Room:
    """What a planned program takes, left to it in the heap from call to call while this object lives.

    glibc gives the top of its heap back to the system whenever 64 MB or more of it are free, in the middle of a step
    too, and each page that the step then asks for again is a fault. A block kept above the room prevents it.
    """

    allowed: ClassVar[bool] = True

    def __init__(self) -> None:
        """Hold nothing yet."""
        self.nbytes = 0
        self._anchor: weakref.finalize[Any, Any] | None = None

    def hold(self, nbytes: int) -> None:
        """See to it that `nbytes` stay with the process, unless its memory is limited or has to go back at once.

        Nothing is touched: until tensors lie there, room is addresses alone.
        """
        if nbytes <= self.nbytes or not (Room.allowed and _tells() and _is_main_thread()) or _is_limited():
            return
        self.release()
        self.nbytes, anchor = nbytes, _block_above(_HOLES * nbytes)
        if anchor is not None:
            self._anchor = weakref.finalize(self, _give_back, anchor)
            self._anchor.atexit = False
            _ROOMS.add(self)

    def release(self) -> None:
        """Let the room go back to the system."""
        if self._anchor is not None:
            self._anchor()
        self.nbytes, self._anchor = 0, None


_ROOMS: weakref.WeakSet[Room] = weakref.WeakSet()


def page_faults() -> int:
    """Return how often a page that was not there was asked for; always 0 where no `Room` can be held."""
    if not _tells():
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def return_free_memory() -> None:
    """Give freed heap pages back, those of rooms too."""
    for room in list(_ROOMS):
        room.release()
    _trim()


def _give_back(anchor: int) -> None:
    _libc().free(anchor)
    _trim()


def _trim() -> None:
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def hold_free_heap() -> list[int]:
    """Allocate what is free in the heap but for 8 MiB, without making it larger; return the blocks."""
    library, held, size = _libc(), [], _LARGEST
    if not _tells():
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


def free_blocks(blocks: list[int]) -> None:
    """Free what `hold_free_heap` returned."""
    for block in blocks:
        _libc().free(block)


def tune_malloc() -> bool:
    """Make glibc give freed tensors back at once, so that a plan's saving is the process's too; False elsewhere.

    Every block of 64 KiB or more gets pages of its own, and the top of the heap is trimmed.
    """
    option: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        Room.allowed = False
        return_free_memory()
    return option is not None and bool(option(_MMAP_THRESHOLD, 64 * 1024)) and bool(option(_TRIM_THRESHOLD, 0))


def _block_above(nbytes: int) -> int | None:
    """Return a block at the top of the heap with `nbytes` of free addresses below it; None where there is none."""
    library = _libc()
    blocks: list[int] = []
    before = library.mallinfo2()
    most = 2 + (nbytes + before.fordblks) // _BLOCK
    chances = 2  # glibc maps no more blocks of the size of one that was freed, unless it was told to

    def grown() -> bool:
        return bool(library.mallinfo2().arena > before.arena)

    # The last one is to come from new addresses, which are above all others.
    while chances and len(blocks) < most and (len(blocks) <= nbytes // _BLOCK or not grown()):
        block = library.malloc(_BLOCK)
        if block is None or library.mallinfo2().hblks > before.hblks:
            library.free(block)
            chances -= 1
        else:
            blocks.append(block)
    anchor = blocks.pop() if chances and grown() else None
    for block in blocks:
        library.free(block)
    _trim()
    return anchor


def _is_limited() -> bool:
    """Return whether addresses count: RLIMIT_DATA or RLIMIT_AS is set."""
    import resource

    kinds = (resource.RLIMIT_DATA, resource.RLIMIT_AS)
    return any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in kinds)


def _is_main_thread() -> bool:
    """Return whether malloc serves this thread from the heap; others have arenas of their own."""
    return threading.current_thread() is threading.main_thread()
