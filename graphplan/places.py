"""places: which line of the user's code, and which layer, an error comes from."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


def user_line(error: BaseException) -> str | None:
    """Return the innermost traceback line that belongs neither to torch nor to graphplan."""
    return _innermost(traceback.extract_tb(error.__traceback__))


def present_line() -> str:
    """Return the innermost line of that kind that is running now, as the end of a message, if there is one."""
    line = _innermost(traceback.extract_stack())
    return "" if line is None else f"\n  at {line}"


def layer_of(error: BaseException, model: nn.Module) -> str | None:
    """Return the innermost layer of `model` that was running when the error came up, None where it was the model."""
    names = {id(module): (name, type(module).__name__) for name, module in model.named_modules() if name}
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = names.get(id(frame.f_locals.get("self")), found)
    return None if found is None else f"{found[0]!r} ({found[1]})"


def _innermost(frames: Iterable[traceback.FrameSummary]) -> str | None:
    found = None
    for frame in frames:
        if not frame.filename.startswith((_TORCH, _HERE, "<")):
            found = frame
    if found is None:
        return None
    source = linecache.getline(found.filename, found.lineno or 0).strip()
    return f"{found.filename}:{found.lineno} in {found.name}: {source}"
