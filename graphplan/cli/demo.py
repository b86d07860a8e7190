"""demo: ResNet-18 on handwritten digits under a memory cap that the operating system enforces."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from graphplan.cap import can_cap
from graphplan.cli.demo_report import Outcome, demo_tables, draw, largest_difference
from graphplan.cli.output import BROKEN, AsJson, BadInput, answering, show, show_json
from graphplan.cli.plan_commands import read_options
from graphplan.errors import GraphplanError, InfeasibleBudget
from graphplan.plan import Plan
from graphplan.progress import Report, bars

# What a training process maps beside its tensors: measured 26 MiB here for both (oneDNN's own scratch and
# code, the allocator's rounding, the interpreter), doubled for machines that are not this one.
MARGIN_BYTES = 52 * 2**20
THREADS = 2
NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
# The same for every process. Each tensor is its own mapping, so that freed memory goes back at once and the
# cap counts tensors, not fragmentation; huge pages make such mappings cheap; waiting threads do not spin.
ENVIRONMENT = {
    "OMP_NUM_THREADS": str(THREADS),
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "65536",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def demo(
    steps: Annotated[int, typer.Option(min=2, help="Training steps.")] = 24,
    batch: Annotated[int, typer.Option(min=2, help="Images a step.")] = 32,
    budget: Annotated[str, typer.Option(help="Of one training step.")] = "68%",
    time_limit: Annotated[float, typer.Option(help="Seconds for solving.")] = 8.0,
    out: Annotated[Path, typer.Option(help="Folder for plan.json and timeline.png.")] = Path("demo_out"),
    as_json: AsJson = None,
) -> None:
    """Train ResNet-18 on digits under a memory cap: unplanned it is refused memory, planned it finishes."""
    with answering(as_json) as json_wanted:
        read_options(budget, "exact", "auto", time_limit)
        check_packages()
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise BadInput(f"--out {str(out)!r}: {e.strerror}") from e
        with bars() as report:
            outcome = play(steps, batch, budget, time_limit, out, report)
        picture = out / "timeline.png"
        if outcome.finished:
            draw(outcome, picture)
        if json_wanted:
            show_json(_as_json(outcome, out))
        else:
            show(*demo_tables(outcome, can_cap()), f"Wrote {out / 'plan.json'} and {picture}.")
        if not outcome.ok:
            raise typer.Exit(BROKEN)


def check_packages() -> None:
    """Say what is missing, and the command that installs it."""
    missing = [pip for name, pip in NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if importlib.util.find_spec("models_zoo") is None:
        raise BadInput("the demo needs the package models_zoo, which comes with graphplan: install graphplan again")


def play(steps: int, batch: int, budget: str, time_limit: float, out: Path, report: Report) -> Outcome:
    """Plan, then train in fresh processes: unplanned and planned under one cap, and unplanned without."""
    from graphplan.cli.demo_worker import Request

    request = Request("plan", batch, steps, budget, time_limit, str(out))
    _work(request, "planning: ", report)
    plan = Plan.load(out / "plan.json")
    allowance = plan.budget_bytes + MARGIN_BYTES if can_cap() else 0
    capped = replace(request, allowance_bytes=allowance)
    capped_eager = _work(replace(capped, mode="eager", measured=False), "unplanned, capped: ", report)
    planned = _work(replace(capped, mode="planned"), "planned, capped: ", report)
    eager = _work(replace(request, mode="eager"), "unplanned, no cap: ", report)
    return Outcome(plan, capped_eager, planned, eager, allowance)


def _work(request: Any, label: str, report: Report) -> dict[str, Any]:
    """Run one worker to its end and return its result."""
    from graphplan.cli.demo_worker import read_events, request_text

    command = [sys.executable, "-m", "graphplan.cli.demo_worker", request_text(request)]
    result: dict[str, Any] | None = None
    report(label + "starting", 0, 1)
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **ENVIRONMENT}
        ) as process:
            assert process.stdout is not None
            report(label + "starting", 1, 1)
            for event in read_events(process.stdout):
                if event["event"] == "progress":
                    report(label + event["stage"], event["done"], event["total"])
                else:
                    result = event
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if line and not line.startswith("USDT:")]
    if result is None and request.allowance_bytes and any("bad_alloc" in line for line in said):
        return {"refusal": "std::bad_alloc: " + said[-1], "losses": []}
    return _result(result, request.mode, process.returncode, said)


def _result(result: dict[str, Any] | None, mode: str, returncode: int, said: list[str]) -> dict[str, Any]:
    if result is None:
        raise GraphplanError(f"the demo's {mode} process ended with {returncode}: " + " | ".join(said[-4:]))
    if result.get("kind") == "InfeasibleBudget":
        raise InfeasibleBudget(result["error"], minimum_bytes=result["minimum_bytes"], binding_op=result["binding_op"])
    if "error" in result:
        raise GraphplanError(result["error"])
    return result


def _as_json(outcome: Outcome, out: Path) -> dict[str, Any]:
    def kept(result: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in result.items() if k not in ("event", "timeline")}

    return {
        "command": "demo",
        "ok": outcome.ok,
        "budget_bytes": outcome.plan.budget_bytes,
        "predicted_peak_bytes": outcome.plan.peak_bytes,
        "unplanned_refused": outcome.refused,
        "planned_finished": outcome.finished,
        "planned_within_budget": outcome.within,
        "largest_loss_difference": largest_difference(outcome),
        "unplanned_capped": kept(outcome.capped_eager),
        "planned_capped": kept(outcome.planned),
        "unplanned": kept(outcome.eager),
        "files": [str(out / "plan.json"), str(out / "timeline.png")],
    }
