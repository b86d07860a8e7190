"""What the anytime solvers share: the clock, the best plan so far, the answer."""

from __future__ import annotations

import math
import time

from solvers.evaluate import Fates
from solvers.problem import Limits, Problem, Progress, Schedule, Solution, Status
from solvers.simulate import Usage, simulate


class Search:
    """One running search: the clock, the cheapest plan that `simulate` accepts, progress."""

    def __init__(self, problem: Problem, limits: Limits, solver: str) -> None:
        """Start the clock."""
        self.problem, self.limits, self.solver = problem, limits, solver
        self.stage = ""  # what a solver of several stages is doing now
        self.found_by = ""  # the stage that found the best plan
        self.started = time.monotonic()
        self.share = 1.0  # of limits.seconds that the present stage may use
        self.work_left = math.inf  # of the work that the present stage may spend
        self.schedule: Schedule | None = None
        self.fates: Fates | None = None
        self.cost_ns: int | None = None
        self.bound_ns: int | None = None  # of the class that the solver searches
        self.any_bound_ns = 0  # of every plan in the program's order
        self.least: tuple[int, Schedule] | None = None  # smallest peak seen, and its schedule

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started

    def spend(self, work: float) -> None:
        """Count work that was done, in seconds as a slow machine would take: the same on every run."""
        self.work_left -= work

    def left(self) -> float:
        """Return what remains of time and work; at most 0 when either is up or the caller cancelled."""
        return min(self.work_left, self.clock())

    def clock(self) -> float:
        """Return the seconds that remain; at most 0 when time is up or the caller cancelled."""
        if self.limits.cancelled is not None and self.limits.cancelled():
            return 0.0
        return self.share * self.limits.seconds - self.seconds()

    def closed(self, gap: float = 0.0) -> bool:
        """Return whether the best plan meets the bound to within a gap, or to within the one asked for."""
        if self.cost_ns is None or self.bound_ns is None:
            return False
        return self.cost_ns - self.bound_ns <= max(gap, self.limits.gap) * self.cost_ns

    def offer(self, schedule: Schedule, fates: Fates | None = None) -> Usage:
        """Simulate a schedule, remember it if it is the best so far, and return its Usage."""
        usage = simulate(self.problem, schedule)
        if self.least is None or usage.peak_bytes < self.least[0]:
            self.least = (usage.peak_bytes, schedule)
        fits = usage.peak_bytes <= self.problem.budget_bytes
        if fits and (self.cost_ns is None or usage.cost_ns < self.cost_ns):
            self.schedule, self.cost_ns = schedule, usage.cost_ns
            self.fates = None if fates is None else fates.copy()
            self.found_by = self.stage
            self.report()
        return usage

    def report(self) -> None:
        """Tell the listener where the search stands."""
        if self.limits.progress is not None:
            self.limits.progress(Progress(self.solver, self.seconds(), self.cost_ns, self.bound_ns))

    def answer(self, bound_ns: int, bound_class: str) -> Solution:
        """Return the best plan; OPTIMAL when its cost meets the bound to within `limits.gap`."""
        least = None if self.least is None else self.least[0]
        if self.schedule is None or self.cost_ns is None:
            return Solution(Status.NOT_FOUND, None, bound_ns, bound_class, self.solver, self.seconds(), least)
        bound = min(bound_ns, self.cost_ns)
        status = Status.OPTIMAL if self.cost_ns - bound <= self.limits.gap * self.cost_ns else Status.FEASIBLE
        name = f"{self.solver}: {self.found_by}" if self.found_by else self.solver
        return Solution(status, self.schedule, bound, bound_class, name, self.seconds(), least)
