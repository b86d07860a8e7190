"""Bytes and nanoseconds as people write and read them."""

from __future__ import annotations

import math
import re

from graphplan.errors import BudgetError

_FACTORS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_HELP = 'write bytes as an int, or text such as "512MiB", "1.5GB" or "60%" (of the unplanned step\'s peak)'


def parse_budget(budget: int | str, baseline_bytes: int) -> int:
    """Return `budget` in bytes; a percentage is of `baseline_bytes`, the unplanned step's peak.

    Raises:
        BudgetError: not a number, not positive, no unit, an unknown unit, or more than 100 %.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float | str):
        raise BudgetError(f"budget {budget!r} is a {type(budget).__name__}; {_HELP}")
    if isinstance(budget, str):
        return _parse_text(budget, baseline_bytes)
    if not math.isfinite(budget) or budget != int(budget):
        raise BudgetError(f"budget {budget!r} is not a whole number of bytes; {_HELP}")
    return _positive(int(budget), budget)


def check_budget(budget: int | str) -> None:
    """Raise BudgetError now for a budget that could never be read, whatever the model."""
    parse_budget(budget, 2**62)


def _parse_text(text: str, baseline_bytes: int) -> int:
    match = re.fullmatch(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z]*|%)\s*", text)
    if match is None:
        raise BudgetError(f"budget {text!r} is not a size; {_HELP}")
    number, unit = float(match[1]), match[2].lower()
    if not math.isfinite(number):
        raise BudgetError(f"budget {text!r} is not a size; {_HELP}")
    if unit == "%":
        if number > 100:
            raise BudgetError(f"budget {text!r} is more than the unplanned step uses; {_HELP}")
        return _positive(int(baseline_bytes * number / 100), text)
    if unit not in _FACTORS:
        if number <= 0:
            raise BudgetError(f"budget {text!r} must be positive; {_HELP}")
        what = f"unknown unit {match[2]!r}" if unit else "has no unit"
        raise BudgetError(f"budget {text!r}: {what}; {_HELP}")
    return _positive(int(number * _FACTORS[unit]), text)


def _positive(value: int, shown: object) -> int:
    if value <= 0:
        raise BudgetError(f"budget {shown!r} must be positive; {_HELP}")
    return value


def format_bytes(n: int) -> str:
    """Return e.g. "12.3 MiB"; exact below 1 KiB."""
    size = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{int(size)} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def format_ns(n: float) -> str:
    """Return e.g. "3.2 ms"."""
    for unit, factor in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if abs(n) >= factor:
            return f"{n / factor:.3g} {unit}"
    return f"{n:.0f} ns"
