"""Kernels written in plain torch, as loops of Numba's or through `torch.compile` where either stands, else as they are.

One source of truth: what runs in place of a kernel is compared with the kernel itself, bit for bit, before its
first use. Inductor's narrow integers have been wrong before (pytorch issues 105264, 135160, 191499).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Any]  # writes to tensors among its arguments, bit for bit; may return small ones, as numbers
Trial = Callable[[torch.device], tuple[Tensor, ...]]  # arguments to try a kernel on, the same at every call


@cache
def compiled(
    kernel: Kernel, trial: Trial, device: torch.device, plain: Kernel, loop: Kernel | None = None
) -> Kernel | None:
    """Return `loop`, or `kernel` compiled for the dtypes and sizes of `trial`; None where neither is to be had.

    Only the length of its first argument, and of those that are as long, may be another.
    `plain` has the same results, and runs better without a compiler. A compiler that fails, or compiles something
    else, is reported once as a RuntimeWarning. One that fails later gives way to `plain`, which begins again.
    """
    if loop is None and not has_compiler(device):
        return None
    expected, found = trial(device), trial(device)
    made = loop or _by_torch(kernel, found)
    try:
        by_plain, by_made = plain(*expected) or (), made(*found) or ()
    except Exception as e:  # noqa: BLE001 - whatever the compiler's reason, the kernel itself runs
        _warn(kernel, f"{type(e).__name__}: {e}")
        return None
    written = all(_same(a, b) for a, b in zip(expected, found, strict=True))
    if not written or not all(_equal(a, b) for a, b in zip(by_plain, by_made, strict=True)):
        _warn(kernel, "its results differ from the kernel's own")
        return None
    return _Falling(made, plain)


def _by_torch(kernel: Kernel, arguments: tuple[Tensor, ...]) -> Kernel:
    # Nothing else is free to change: guards on more run into a limit of recompilations.
    made: Kernel = torch.compile(_alone(kernel), dynamic=False, fullgraph=True)
    for tensor in arguments:
        if len(tensor) == len(arguments[0]):
            torch._dynamo.mark_dynamic(tensor, 0)

    def run(*args: Any) -> Any:
        with _as_an_op():
            return made(*args)

    return run


class _Falling:
    """A compiled kernel until it fails, from then on the kernel itself."""

    def __init__(self, made: Kernel, kernel: Kernel) -> None:
        self.run, self.kernel = made, kernel

    def __call__(self, *args: Any) -> Any:
        try:
            return self.run(*args)
        except Exception as e:  # a step that trains is not to end because of a compiler
            if self.run is self.kernel:
                raise
            _warn(self.kernel, f"{type(e).__name__}: {e}")
            self.run = self.kernel
            return self.kernel(*args)


@contextmanager
def _as_an_op() -> Iterator[None]:
    """What is compiled is for one state of autograd's: that inside an op, where kernels are called."""
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        yield


def _alone(kernel: Kernel) -> Kernel:
    """Return the same function with code of its own: Dynamo counts recompilations by code object, up to a limit."""
    code = kernel.__code__.replace(co_name=f"{kernel.__code__.co_name}_alone")
    return FunctionType(code, kernel.__globals__, code.co_name, kernel.__defaults__, kernel.__closure__)


@cache
def has_compiler(device: torch.device) -> bool:
    """Return whether a compiler for kernels on `device` stands: a C++ compiler, or Triton."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return device.type == "cpu" and bool(get_cpp_compiler())
    except RuntimeError:  # InvalidCxxCompiler
        return False


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return whether results are the same numbers: which zero or NaN one is, is the caller's to settle."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, but for which NaN a NaN is: ATen's own differ by place."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(((a.view(words) == b.view(words)) | (a.isnan() & b.isnan())).all())


def _warn(kernel: Kernel, reason: str) -> None:
    name = getattr(kernel, "__name__", str(kernel))
    warnings.warn(f"graphplan runs {name} uncompiled, by chunks: {reason[:500]}", RuntimeWarning, stacklevel=4)
