"""Budgets: how many bytes a client may use, where that is said, and a careful guess of what stays free."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from graphplan.errors import BudgetError
from graphplan.units import parse_budget

WINDOW = 8  # observations that the prediction looks back on
QUANTILE = 0.1
RESERVE_SHARE = 0.1  # of the machine's memory, left alone where nobody states a budget
_CGROUP = Path("/sys/fs/cgroup")


def read_budget(node_config: Mapping[str, object]) -> tuple[int, str]:
    """Return (bytes, where from): `memory-budget-file`, `memory-budget`, the cgroup's limit, or free memory.

    The file holds a size as `memory-budget` does, and may change while the client runs.

    Raises:
        BudgetError: a budget is stated and cannot be read.
    """
    if path := node_config.get("memory-budget-file"):
        try:
            return parse_budget(_number_or_text(Path(str(path)).read_text().strip()), 0), "file"
        except OSError as e:
            raise BudgetError(f"memory-budget-file {path}: {e}") from e
    if stated := node_config.get("memory-budget"):
        return parse_budget(_number_or_text(str(stated)), 0), "node config"
    free, total = _free_and_total()
    return max(1, free - int(RESERVE_SHARE * total)), "free memory"


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _free_and_total() -> tuple[int, int]:
    """The tighter of the control group's limit and the machine's free memory."""
    machine = importlib.import_module("psutil").virtual_memory()
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return machine.available, machine.total
    if limit == "max":
        return machine.available, machine.total
    return min(machine.available, int(limit) - used), min(machine.total, int(limit))


def predict(observed: Sequence[int], window: int = WINDOW, quantile: float = QUANTILE) -> int:
    """Return a low quantile of the last `window` observed budgets, never above the latest.

    What was free a moment ago is no promise: other programs come back. Source of the idea: FedHybrid's memory
    budget predictor, whose internals are not published; the quantile is ours.
    """
    recent = sorted(observed[-window:])
    return min(observed[-1], recent[int(quantile * (len(recent) - 1))])


Budget = Callable[[], int]  # the bytes that may be used now
