"""The JSON form of a program: values of calls, tensors' geometries, and the checks that need no torch op."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphplan.errors import GraphplanError

FORMAT, VERSION = "graphplan-program", 1
MOST_TEXT = 32 << 20
MOST_NODES = 100_000
MOST_DEPTH = 4  # of lists in a call's arguments
MOST_DIMS = 8
_PATH = re.compile(r"\w{1,64}(\.\w{1,64}){0,31}", re.ASCII)
_WORD = re.compile(r"\w{1,32}", re.ASCII)
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip
NAMED: dict[str, dict[str, Any]] = {
    "dtype": DTYPES,
    "layout": {"strided": torch.strided},
    "device": {"cpu": torch.device("cpu")},
    "memory_format": {
        n: getattr(torch, n) for n in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
    },
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
}


class ProgramError(GraphplanError, ValueError):
    """A program that cannot be written, or a document that is refused; the message names the place."""


class ProgramTooLarge(ProgramError):
    """A program that needs more memory than there is, by its tensors alone."""


def need(holds: object, message: str) -> None:
    """Raise ProgramError with `message` unless `holds`."""
    if not holds:
        raise ProgramError(message)


def check_bytes(nbytes: int, most_bytes: int, where: str) -> None:
    """Raise ProgramTooLarge for more bytes than are allowed."""
    if nbytes > most_bytes:
        raise ProgramTooLarge(f"{where}: {nbytes} bytes in use; {most_bytes} are allowed")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape, strides and dtype of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(t: Tensor) -> Geometry:
        """Return the geometry of `t`."""
        return Geometry(tuple(t.shape), tuple(t.stride()), t.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes from the first to the last element."""
        if 0 in self.shape:
            return 0
        return (1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))) * self.dtype.itemsize

    def json(self) -> list[Any]:
        """Return [dtype, shape, stride]."""
        return [str(self.dtype).removeprefix("torch."), list(self.shape), list(self.stride)]

    @staticmethod
    def read(data: Any, where: str, most_bytes: int) -> Geometry:
        """Read what `json` wrote.

        Raises:
            ProgramError: not a geometry, or one of more than `most_bytes`.
        """
        need(isinstance(data, list) and len(data) == 3, f"{where}: expected [dtype, shape, stride]")
        dtype, shape, stride = data
        need(isinstance(dtype, str) and dtype in DTYPES, f"{where}: no dtype {dtype!r}")
        for sizes in (shape, stride):
            good = isinstance(sizes, list) and all(type(n) is int and 0 <= n < 1 << 40 for n in sizes)
            need(good and len(sizes) <= MOST_DIMS, f"{where}: {sizes!r} are no sizes")
        need(len(shape) == len(stride), f"{where}: {len(shape)} sizes and {len(stride)} strides")
        found = Geometry(tuple(shape), tuple(stride), DTYPES[dtype])
        check_bytes(found.nbytes, most_bytes, where)
        return found

    def empty(self) -> Tensor:
        """Return a tensor of this geometry."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


def write_value(value: Any, index: dict[fx.Node, int], where: str) -> Any:
    """Return a call's argument as JSON."""
    if isinstance(value, fx.Node):
        return {"%": index[value]}
    if isinstance(value, list | tuple):
        return [write_value(v, index, where) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for kind, names in NAMED.items():
        name = next((n for n, v in names.items() if type(v) is type(value) and v == value), None)
        if name is not None:
            return {kind: name}
    raise ProgramError(f"{where} has an argument that programs cannot hold: {value!r}")


def read_value(data: Any, node: Callable[[int], Any], where: str, most: int, depth: int = 0) -> Any:
    """Return the argument that `data` stands for; `node(i)` gives what stands for node i.

    Raises:
        ProgramError: something that no argument is, or a list with a number above `most`.
    """
    if data is None or isinstance(data, bool | float):
        return data
    if isinstance(data, int):
        need(-(1 << 63) <= data < 1 << 63, f"{where}: {data} is no int64")
        return data
    if isinstance(data, str):
        need(_WORD.fullmatch(data), f"{where}: {data[:40]!r} is no word")
        return data
    if isinstance(data, list):
        need(depth < MOST_DEPTH, f"{where}: lists nested deeper than {MOST_DEPTH}")
        need(all(abs(n) <= most for n in data if type(n) is int), f"{where}: {data[:9]} is too large")
        return [read_value(v, node, where, most, depth + 1) for v in data]
    need(isinstance(data, dict) and len(data) == 1, f"{where}: {str(data)[:60]} is no argument")
    (kind, name), *_ = data.items()
    if kind == "%":
        need(type(name) is int, f"{where}: node {name!r}")
        return node(name)
    need(kind in NAMED and isinstance(name, str) and name in NAMED[kind], f"{where}: no {kind!r} {str(name)[:40]!r}")
    return NAMED[kind][name]


def read_path(data: Any, where: str) -> str:
    """Return the dotted path of a parameter or buffer.

    Raises:
        ProgramError: anything else.
    """
    need(isinstance(data, str) and _PATH.fullmatch(data), f"{where}: {str(data)[:60]!r} is no parameter's path")
    return str(data)


def read_count(data: Any, where: str, most: int = 1 << 62) -> int:
    """Return a whole number from 0 to `most`.

    Raises:
        ProgramError: anything else.
    """
    need(type(data) is int and 0 <= data <= most, f"{where}: {str(data)[:40]} is not from 0 to {most}")
    return int(data)
