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
    """A Report that passes everything on and keeps how long each stage took, from its first report to its last."""

    def __init__(self, report: Report) -> None:
        """Listen in front of `report`."""
        self.report, self.spans = report, dict[str, tuple[float, float]]()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report, and note the time."""
        now = time.perf_counter()
        self.spans[stage] = (self.spans.get(stage, (now, now))[0], now)
        self.report(stage, done, total)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage, in order."""
        return {stage: last - first for stage, (first, last) in self.spans.items()}


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
