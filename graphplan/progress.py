"""Progress reports: a callable (stage, done, total); a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int], None]


def quiet(stage: str, done: int, total: int) -> None:
    """Report nothing."""


class Stages:
    """A Report that passes everything on and keeps how long each stage took, summed over the forms of a step."""

    def __init__(self, report: Report) -> None:
        """Listen in front of `report`."""
        self.report, self.latest, self.spent = report, time.perf_counter(), dict[str, float]()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report, and note the time since the report before, of whatever stage, unless this one begins only now."""
        now = time.perf_counter()
        self.spent[stage] = self.spent.get(stage, 0.0) + (now - self.latest if done else 0.0)
        self.latest = now
        self.report(stage, done, total)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage, in order."""
        return dict(self.spent)


def bars_or(report: Report) -> contextlib.AbstractContextManager[Report]:
    """Return `report` where somebody listens, else bars on a terminal."""
    return bars() if report is quiet else contextlib.nullcontext(report)


@contextlib.contextmanager
def bars(enabled: bool | None = None) -> Iterator[Report]:
    """Yield a Report that draws one transient bar a stage on standard error (None: only on a terminal)."""
    if not (sys.stderr.isatty() if enabled is None else enabled):
        yield quiet
        return
    columns = (SpinnerColumn(), TextColumn("{task.description:<22}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, object] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield report
