"""What every command shares: exit codes, JSON or tables, and errors as one line without a traceback."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from graphplan.errors import GraphplanError, InfeasibleBudget, PromiseBroken

DONE, BAD_INPUT, INFEASIBLE, BROKEN = 0, 2, 3, 4
EXIT_CODES = (
    "Exit codes: 0 done; 2 bad input; 3 infeasible budget; 4 a promise broken "
    "(a measured peak over the budget, a gradient mismatch, a missing client reply)."
)
PLAIN_WIDTH = 110  # columns where no terminal says how wide it is

AsJson = Annotated[
    bool | None,
    typer.Option("--json/--table", help="JSON or tables; by default tables on a terminal and JSON elsewhere."),
]


class BadInput(GraphplanError, ValueError):
    """What was typed cannot be used; the message says what could be."""


def wants_json(flag: bool | None) -> bool:
    """Return whether to write JSON: as asked, else whenever standard output is not a terminal."""
    return not sys.stdout.isatty() if flag is None else flag


def show(*parts: RenderableType) -> None:
    """Write tables and text on standard output."""
    console = Console(
        file=sys.stdout, width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, markup=False
    )
    for part in parts:
        console.print(Text(part) if isinstance(part, str) else part)


def show_json(data: dict[str, Any]) -> None:
    """Write one JSON object on standard output."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


@contextlib.contextmanager
def answering(as_json: bool | None) -> Iterator[bool]:
    """Yield whether to write JSON; turn graphplan's errors into a line on standard error and an exit code."""
    json_wanted = wants_json(as_json)
    try:
        yield json_wanted
    except GraphplanError as e:
        code = exit_code(e)
        sys.stderr.write(f"error: {e}\n")
        if json_wanted:
            found: dict[str, Any] = {"error": str(e), "kind": type(e).__name__, "exit_code": code}
            if isinstance(e, InfeasibleBudget):
                found.update(minimum_bytes=e.minimum_bytes, binding_op=e.binding_op)
            show_json(found)
        raise typer.Exit(code) from e


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing into files.

    Raises:
        BadInput: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ModuleNotFoundError as e:
        raise BadInput(f"a picture needs matplotlib ({e}): pip install 'graphplan[demo]'") from e


def exit_code(error: GraphplanError) -> int:
    """Return the exit code that `error` means."""
    if isinstance(error, InfeasibleBudget):
        return INFEASIBLE
    return BROKEN if isinstance(error, PromiseBroken) else BAD_INPUT
