"""Every command, its JSON, its exit codes, and the text of `show` for a plan with fixed numbers."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import solvers
from graphplan import Decision, Plan, PromiseBroken
from graphplan.cli import COMMANDS, app, run_commands
from graphplan.cli.models import parse_input, resolve
from graphplan.cli.output import BAD_INPUT, BROKEN, DONE, INFEASIBLE, BadInput

GOLDEN = Path(__file__).parent / "golden"
FACTORY = '''
"""A module of a user's own."""
import torch
from torch import nn

def net():
    print("a user's own message on standard output")
    hidden = [layer for _ in range(5) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, 16), *hidden, nn.Linear(16, 4))

def pair():
    return net(), (torch.randn(256, 8),)

def with_loss():
    return net(), (torch.randn(256, 8),), lambda out: out.square().mean()

def broken():
    raise ValueError("the weights are not there")

def number():
    return 3

def evaluated():
    return pair()[0].eval(), (torch.randn(256, 8),)
'''
SMALL = ["--time-limit", "3"]


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("factory") / "own_model.py"
    path.write_text(FACTORY)
    return str(path)


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def answer(*words: object) -> dict[str, Any]:
    result = call(*words)
    assert result.exit_code == DONE, result.output
    return json.loads(result.stdout)


def refused(code: int, *words: object) -> str:
    result = call(*words)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    said = result.stderr.strip().splitlines()[-1]
    assert json.loads(result.stdout)["exit_code"] == code
    return said


def fixed_plan(**changed: Any) -> Plan:
    """A plan whose every figure is written here, so that its text never moves."""
    values: dict[str, Any] = {
        "model": "Tiny",
        "fingerprint": "0123456789abcdef",
        "steps": ("linear", "relu", "loss", "relu:again", "linear_backward"),
        "decisions": {
            "linear": Decision("keep", 4 * 2**20),
            "relu": Decision("recompute", 2 * 2**20),
            "mask[0]": Decision("compress", 2**20, "bitmask", 2**17),
        },
        "budget_bytes": 12 * 2**20,
        "peak_bytes": 11 * 2**20,
        "baseline_peak_bytes": 20 * 2**20,
        "minimum_peak_bytes": 9 * 2**20,
        "fixed_bytes": 3 * 2**20,
        "outside_bytes": 4096,
        "loss_measured": True,
        "cost_ns": 5_500_000,
        "baseline_cost_ns": 5_000_000,
        "lower_bound_ns": 5_400_000,
        "any_bound_ns": 5_350_000,
        "bound_class": "one recompute a value",
        "status": "feasible",
        "solver": "auto",
        "codecs": ("bitmask",),
        "peak_step": "linear_backward",
        "peak_live": (("linear", 4 * 2**20), ("relu", 2 * 2**20)),
        "minimum_reason": "op 'linear_backward' alone takes 9.0 MiB: parameters and inputs 3.0 MiB",
        "device": "a fixed machine",
        "torch_version": "2.13.0",
        "measured": True,
        "gradient_noise": 0.0,
        "noise": 0.0,
        "noise_measured": 0.0,
        "noise_bias": 0.0,
    }
    known = {f.name for f in fields(Plan)}
    assert known >= values.keys() - {"loss_measured"}, "Plan lost a field: change this plan and the golden text"
    return Plan(**{k: v for k, v in (values | changed).items() if k in known})


@pytest.mark.parametrize(("name", "words"), [("show", 1), ("diff", 2)])
def test_the_text_of_a_fixed_plan(name: str, words: int, tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    fixed_plan().save(paths[0])
    fixed_plan(peak_bytes=10 * 2**20, decisions={"linear": Decision("recompute", 4 * 2**20)}).save(paths[1])
    result = call(name, *paths[:words], "--table")
    assert result.exit_code == DONE, result.output
    text = "\n".join(line.rstrip() for line in result.stdout.splitlines()) + "\n"
    golden = GOLDEN / f"cli_{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text(), "if the new text is right: UPDATE_GOLDEN=1 pytest tests/test_cli.py"


def test_show_and_diff_as_json(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    fixed_plan().save(a)
    fixed_plan(decisions={"linear": Decision("recompute", 4 * 2**20)}).save(b)
    shown = answer("show", a, "--json")
    assert shown["activations"]["compressed"] == {"count": 1, "bytes": 2**20}
    assert shown["decisions"]["mask[0]"]["codec"] == "bitmask"
    changed = answer("diff", a, b)["changed"]
    assert set(changed) == {"linear", "relu", "mask[0]"}
    assert changed["linear"]["after"]["fate"] == "recompute"


def test_plan_then_run_then_check(factory: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    planned = answer("plan", f"{factory}:with_loss", "--budget", "85%", "--out", out, *SMALL)
    assert planned["peak_bytes"] <= planned["budget_bytes"] < planned["baseline_peak_bytes"]
    assert planned["activations"]["kept"]["count"] >= 1
    assert Plan.load(out).budget_bytes == planned["budget_bytes"]
    ran = answer("run", f"{factory}:with_loss", "--plan", out, "--steps", "3")
    assert ran["ok"]
    assert len(ran["losses"]) == 3
    assert ran["losses"][-1] < ran["losses"][0]
    assert ran["peak_bytes"] <= ran["budget_bytes"]
    assert ran["eager_peak_bytes"] > 0
    checked = answer("check", f"{factory}:with_loss", "--plan", out)
    assert checked["ok"]
    assert len(checked["checks"]) >= 8


def test_tables_name_what_a_person_wants(factory: str) -> None:
    result = call("plan", f"{factory}:pair", "--budget", "100%", "--table", "--graph", *SMALL)
    assert result.exit_code == DONE, result.output
    for words in ("budget", "unplanned peak", "planned peak", "overhead", "gap", "kept", "recomputed"):
        assert words in result.stdout
    for words in ("compressed", "In use at the peak", "Least feasible peak", "Next: graphplan run"):
        assert words in result.stdout
    ran = call("run", f"{factory}:pair", "--budget", "100%", "--steps", "1", "--no-compare", "--table", *SMALL)
    assert "within the budget" in ran.stdout
    checked = call("check", f"{factory}:pair", "--budget", "100%", "--table", *SMALL)
    assert checked.exit_code == DONE, checked.output
    assert "equal to the bit" in checked.stdout


def test_every_solver_is_compared(factory: str) -> None:
    words = ["plan", f"{factory}:pair", "--budget", "98%", "--solver", "all", "--time-limit", "1"]
    rows = answer(*words)["solvers"]
    assert len(rows) == len(solvers.SOLVERS)
    assert any(r["peak_bytes"] is not None for r in rows)
    table = call(*words, "--codecs", "none", "--table")
    assert "Solvers under this budget" in table.stdout


def test_a_model_of_the_zoo_and_named_codecs() -> None:
    words = ("--size", "small", "--batch", "4", "--codecs", "bitmask,narrow")
    planned = answer("plan", "models_zoo:mlp", "--budget", "100%", *words, *SMALL)
    assert planned["model"] == "MLP"


def test_solvers_and_models_are_listed() -> None:
    assert set(answer("solvers")["solvers"]) == set(solvers.SOLVERS)
    listed = {m["name"]: m for m in answer("models")["models"]}
    assert listed["models_zoo:resnet18"]["parameters"] == 11_689_512
    assert "resnet18" in call("models", "--table").stdout
    assert "greedy" in call("solvers", "--table").stdout


@pytest.mark.parametrize("budget", ["0", "-5", "60", "abc", "140%", "5 parsecs", ""])
def test_a_budget_that_cannot_be_read(budget: str) -> None:
    said = refused(BAD_INPUT, "plan", "models_zoo:mlp", f"--budget={budget}")
    assert "512MiB" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("models_zoo:resnet81", "resnet18"),
        ("mlp", "did you mean models_zoo:mlp"),
        ("nowhere.py:net", "no file"),
        ("no_such_package_here:net", "no module"),
        ("{}:nett", "did you mean net"),
        ("{}:broken", "ValueError: the weights are not there"),
        ("{}:number", "int"),
        ("{}:net", "--input"),
        (":", "name it"),
    ],
)
def test_a_model_that_cannot_be_named(name: str, words: str, factory: str) -> None:
    assert words in refused(BAD_INPUT, "plan", name.format(factory), "--budget", "60%")


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def net(:\n")
    assert "SyntaxError" in refused(BAD_INPUT, "plan", f"{bad}:net", "--budget", "60%")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--solver", "magic"], "choose from auto"),
        (["--codecs", "zip"], "no codec 'zip'"),
        (["--time-limit", "0"], "positive"),
        (["--size", "huge"], '"real" or "small"'),
        (["--out", "/nowhere/plan.json"], "no folder"),
    ],
)
def test_an_option_that_cannot_be_used(words: list[str], said: str) -> None:
    assert said in refused(BAD_INPUT, "plan", "models_zoo:mlp", "--budget", "60%", *words)


def test_a_plan_file_that_cannot_be_read(tmp_path: Path, factory: str) -> None:
    assert "cannot read" in refused(BAD_INPUT, "show", tmp_path / "absent.json")
    bad = tmp_path / "bad.json"
    bad.write_text(fixed_plan().to_json()[:200])
    assert "truncated" in refused(BAD_INPUT, "show", bad)
    bad.write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in refused(BAD_INPUT, "diff", bad, bad)
    foreign = tmp_path / "foreign.json"
    fixed_plan().save(foreign)
    assert "Tiny" in refused(BAD_INPUT, "run", f"{factory}:pair", "--plan", foreign)
    assert "either" in refused(BAD_INPUT, "run", f"{factory}:pair")
    assert "either" in refused(BAD_INPUT, "check", f"{factory}:pair", "--plan", foreign, "--budget", "60%")


def test_typer_refuses_with_the_same_code() -> None:
    assert call("plan", "models_zoo:mlp").exit_code == BAD_INPUT
    assert call("nonsense").exit_code == BAD_INPUT


def test_an_infeasible_budget_says_what_would_fit(factory: str) -> None:
    result = call("plan", f"{factory}:pair", "--budget", "5%", *SMALL)
    assert result.exit_code == INFEASIBLE
    assert "Raise the budget" in result.stderr
    assert json.loads(result.stdout)["minimum_bytes"] > 0
    assert call("run", f"{factory}:pair", "--budget", "5%", *SMALL).exit_code == INFEASIBLE


def test_a_broken_promise_has_its_own_code(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*args: object, **kwargs: object) -> None:
        raise PromiseBroken("gradients differ")

    monkeypatch.setattr(run_commands, "verify", breaks)
    refused(BROKEN, "check", f"{factory}:pair", "--budget", "100%", *SMALL)


def test_a_peak_above_the_budget_has_its_own_code(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = run_commands._measured

    def above(*args: Any) -> Any:
        from dataclasses import replace

        return replace(measured(*args), peak_bytes=2**40)

    monkeypatch.setattr(run_commands, "_measured", above)
    result = call("run", f"{factory}:pair", "--budget", "100%", "--steps", "1", *SMALL)
    assert result.exit_code == BROKEN
    assert json.loads(result.stdout)["ok"] is False


def test_every_help_documents_the_exit_codes() -> None:
    for name in COMMANDS:
        text = " ".join(call(name, "--help").stdout.split())
        assert "0 done; 2 bad input; 3 infeasible budget; 4 a promise broken" in text


def test_example_inputs_and_training_mode(factory: str) -> None:
    assert parse_input("2,3").shape == (2, 3)
    assert parse_input("8,4:int64").dtype == torch.int64
    for text in ("", "2,x", "0,3", "2,3:words", "2,3:nn"):
        with pytest.raises(BadInput):
            parse_input(text)
    named = resolve(f"{factory}:net", inputs=["5,8"])
    assert named.inputs[0].shape == (5, 8)
    assert resolve(f"{factory}:evaluated").module.training
    with pytest.raises(BadInput, match="--input"):
        resolve(f"{factory}:pair", batch=3)


def test_the_frontier_as_json_picture_and_plans(factory: str, tmp_path: Path) -> None:
    out, plot = tmp_path / "plans", tmp_path / "frontier.png"
    out.mkdir()
    words = ("pareto", f"{factory}:with_loss", "--points", "4", "--out", out, "--plot", plot, "--time-limit", "6")
    plans = answer(*words)["plans"]
    costs, peaks = [p["cost_ns"] for p in plans], [p["peak_bytes"] for p in plans]
    assert costs == sorted(costs, reverse=True)
    assert peaks == sorted(peaks)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(list(out.iterdir())) == len(plans)
    assert "Frontier of" in call(*words, "--table").stdout


def test_trace_prints_the_graph_or_its_code(factory: str, tmp_path: Path) -> None:
    traced = answer("trace", f"{factory}:pair")
    assert traced["ops"] > 10
    assert "--- backward ---" in traced["text"]
    out = tmp_path / "graph.txt"
    assert "wrote" in call("trace", f"{factory}:pair", "--code", "--out", out, "--table").stdout
    assert "def forward(self" in out.read_text()


def test_a_device_profile_stands_in_for_its_machine(factory: str, tmp_path: Path) -> None:
    out = tmp_path / "device.json"
    found = answer("profile", f"{factory}:pair", "--out", out)
    assert found["step_ns"] == sum(op["ns"] for op in found["ops"]) > 0
    planned = answer("plan", f"{factory}:pair", "--budget", "100%", "--device", out, *SMALL)
    assert planned["measured"]
    assert "memory of each op" not in planned["stages_s"]
    assert "capture" in planned["stages_s"]
    assert "All ops once" in call("profile", f"{factory}:pair", "--table").stdout
    assert "cannot read device" in refused(
        BAD_INPUT, "plan", f"{factory}:pair", "--budget", "60%", "--device", tmp_path / "absent.json"
    )
    out.write_text("{")
    assert "not a device file" in refused(BAD_INPUT, "plan", f"{factory}:pair", "--budget", "60%", "--device", out)
