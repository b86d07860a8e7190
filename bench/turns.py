"""Steps in turn of programs that each have a process of their own, as users run them: no program finds another's heap.

In one process the plain loop finds the room that a planned step keeps in the heap (graphplan/heap.py), and the planned
one what the plain loop's gradients pin there. `python -m bench.turns MODEL planned|plain` is one such process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bench.pairs import over_twice
from bench.processes import ROOT

DONE = "done"


@contextmanager
def worker(name: str, kind: str) -> Iterator[Callable[[], None]]:
    """Yield what makes the process take one step and returns when it is done; the process waits otherwise."""
    command = [sys.executable, "-m", "bench.turns", name, kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        given, told = process.stdin, process.stdout
        assert given is not None
        assert told is not None

        def wait() -> None:
            while (line := told.readline()).strip() != DONE:
                if not line:
                    raise RuntimeError(f"the process of {name}, {kind}, ended")

        def step() -> None:
            given.write("\n")
            given.flush()
            wait()

        wait()
        yield step
        given.close()


def serve(step: Callable[[], object]) -> None:
    """Take a step for each line that comes."""
    print(DONE, flush=True)
    for _ in sys.stdin:
        step()
        print(DONE, flush=True)


def measure_apart(name: str, seconds: float) -> dict[str, Any]:
    """Return the same of a zoo model at 100 %, each loop in a process of its own."""
    with worker(name, "planned") as planned, worker(name, "plain") as plain:
        return {"name": name, **over_twice(planned, plain, seconds)}


def main() -> None:
    from bench.step import Loops

    name, kind = sys.argv[1:]
    loops = Loops.of(name)
    serve(loops.planned() if kind == "planned" else loops.plain())


if __name__ == "__main__":
    main()
