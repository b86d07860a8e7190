"""`--step`: whole training steps from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import answer, call, factory, refused  # noqa: F401  (factory is a fixture)

from graphplan import Plan
from graphplan.cli.output import BAD_INPUT, INFEASIBLE

ROOT = Path(__file__).parent.parent
SMALL = ("--time-limit", "2")


@pytest.mark.parametrize("step", ["momentum", "adamw"])
def test_plan_run_and_check_a_step(step: str, factory: str, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "plan.json"
    planned = answer("plan", f"{factory}:with_loss", "--budget", "100%", "--step", step, "--out", out, *SMALL)
    assert planned["peak_bytes"] <= planned["budget_bytes"]
    assert Plan.load(out).update == {"momentum": "sgd", "adamw": "adam"}[step]
    ran = answer("run", f"{factory}:with_loss", "--plan", out, "--steps", "3", "--step", step)
    assert ran["ok"]
    assert ran["losses"][-1] < ran["losses"][0]
    assert ran["peak_bytes"] <= ran["budget_bytes"]
    checked = answer("check", f"{factory}:with_loss", "--plan", out, "--step", step)
    assert checked["ok"]


def test_a_step_plan_runs_in_another_process(factory: str, tmp_path: Path) -> None:  # noqa: F811
    """Functions of our own in the graph are named there as here: the fingerprint is the same."""
    out = tmp_path / "plan.json"
    words = [f"{factory}:with_loss", "--step", "adamw"]
    answer("plan", *words, "--budget", "100%", "--out", out, *SMALL)
    code = "import sys; from graphplan.cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, "check", *words, "--plan", str(out)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_step_refuses(factory: str, tmp_path: Path) -> None:  # noqa: F811
    words = ("plan", f"{factory}:with_loss", "--budget")
    assert "choose from sgd, momentum, adam, adamw" in refused(BAD_INPUT, *words, "100%", "--step", "lbfgs")
    assert call(*words, "1KiB", "--step", "sgd", *SMALL).exit_code == INFEASIBLE
    out = tmp_path / "plan.json"
    answer(*words, "100%", "--step", "sgd", "--out", out, *SMALL)
    assert "whole step with sgd" in refused(BAD_INPUT, "run", f"{factory}:with_loss", "--plan", out)


def test_every_solver_is_compared_on_a_step(factory: str) -> None:  # noqa: F811
    words = (
        "plan",
        f"{factory}:with_loss",
        "--budget",
        "100%",
        "--step",
        "sgd",
        "--solver",
        "all",
        "--time-limit",
        "1",
    )
    assert "keep-all" in call(*words, "--table").stdout.replace("_", "-")
