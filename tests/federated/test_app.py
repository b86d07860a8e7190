"""The app's declaration, the options of a run, and the command line's answers to bad input."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from typer.testing import CliRunner

from graphplan.cli import app
from graphplan.cli.output import BAD_INPUT
from graphplan.federated import METHODS, FederatedError, RunConfig
from graphplan.federated.launch import write_app

ROOT = Path(__file__).parents[2]


def test_the_repository_is_a_flower_app_with_the_defaults_of_run_config() -> None:
    declared, warnings = load_and_validate(ROOT / "pyproject.toml")
    assert warnings == []
    assert declared["tool"]["flwr"]["app"]["config"] == RunConfig().flower()


def test_the_app_for_an_installed_graphplan_can_be_bundled(tmp_path: Path) -> None:
    write_app(tmp_path / "app")
    load_and_validate(tmp_path / "app" / "pyproject.toml")
    assert len(build_fab_from_disk(tmp_path / "app")) < 4096
    declared = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
    assert declared["project"]["dependencies"] == []


def test_run_options_come_back_from_flowers_form_and_reject_what_is_wrong() -> None:
    config = RunConfig(method="fedavg", clients=3, per_round=2, learning_rate=0.5)
    assert RunConfig.of(config.flower()) == config
    assert RunConfig.of({"learning-rate": 1}).learning_rate == 1.0
    for bad in ({"clents": 3}, {"clients": "3"}, {"clients": 0}, {"learning-rate": 0.0}, {"cap": 1}):
        with pytest.raises(FederatedError):
            RunConfig.of(bad)


def test_the_command_line_lists_methods_and_says_what_is_wrong(tmp_path: Path) -> None:
    call = CliRunner().invoke
    assert json.loads(call(app, ["fl", "methods", "--json"]).stdout)["methods"].keys() == METHODS.keys()
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(
        '[[class]]\nname = "x"\nshare = 1\nmemory = [0.5]\nspeed = 1\nuplink_mbps = 1\ndownlink_mbps = 1\n'
    )
    for wrong, said in (
        (["run", "--method", "best"], "no method 'best'; there are fedhybrid"),
        (["run", "--fleet", str(fleet)], "memory is [0.5]; write [low, high]"),
        (["run", "--fleet", str(tmp_path / "none.toml")], "No such file"),
        (["run", "--clients", "2", "--per-round", "3"], "per_round is 3, but there are 2 clients"),
        (["up", "--budget", "64 parsecs"], "unknown unit 'parsecs'"),
    ):
        result = call(app, ["fl", *wrong, "--json"])
        assert result.exit_code == BAD_INPUT
        assert said in json.loads(result.stdout)["error"]
