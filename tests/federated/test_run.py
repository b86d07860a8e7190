"""Whole runs on the double: every method, what its clients measured, and the same numbers as Flower's own engine."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graphplan.device import Device
from graphplan.federated import METHODS, FederatedError, Frontier, RunConfig
from graphplan.federated import client as client_module
from graphplan.federated.execution import Outcome, train
from graphplan.federated.launch import run_simulation
from graphplan.federated.testing import run_in_process

Run = Callable[[RunConfig], dict[str, Any]]
MEASURED = {"wall_seconds"}  # differ from run to run
MEASURED_OF_CLIENTS = {"step_ns", "rss_growth_bytes"}


def _figures(report: dict[str, Any]) -> Any:
    rounds = [{k: v for k, v in row.items() if k not in MEASURED} for row in report["rounds"]]
    clients = [{k: v for k, v in row.items() if k not in MEASURED_OF_CLIENTS} for row in report["clients"]]
    return rounds, clients


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_keeps_to_its_budgets(name: str, config: RunConfig, run: Run) -> None:
    report = run(replace(config, method=name, codecs=""))
    _check_budgets(report, name)


def test_every_form_of_a_step_lets_clients_take_part_that_no_other_plan_fits(config: RunConfig, run: Run) -> None:
    """An mlp is parameters and gradients: plans of forward and backward save nothing, so that tight clients refuse."""
    mlp = replace(config, model="models_zoo:mlp", device="", batch=64, points=2)
    report = run(replace(mlp, codecs="", forms=True))
    _check_budgets(report, "forms")
    assert (report["rounds"][0]["taking_part"], run(mlp)["rounds"][0]["taking_part"]) == (4, 2)


def test_whole_steps_may_round(config: RunConfig) -> None:
    tight = config.fleet.replace("[0.75, 0.95]", "[0.7, 0.8]")
    rounding = replace(config, method="compress_only", step=True, codecs="", device="", fleet=tight)
    frontiers: dict[Hashable, Frontier] = {}
    report = run_in_process(rounding, made=frontiers)
    _check_budgets(report, "whole steps that round")
    plans = [p for f in frontiers.values() for p in f.plans]
    assert all(p.update == "sgd" for p in plans)
    assert any(p.noise > 0 for p in plans)


def test_clients_train_on_as_many_threads_as_the_given_device(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A saved profile says what ops need on its number of threads: on another one a plan's bytes may be exceeded."""
    seen = set[int]()

    def looking(*args: Any) -> Outcome:
        seen.add(torch.get_num_threads())
        return train(*args)

    monkeypatch.setattr(client_module, "train", looking)
    device = replace(Device.load(config.device), threads=3)
    device.save(tmp_path / "device.json")
    report = run_in_process(replace(config, method="fedavg", device=str(tmp_path / "device.json")))
    assert (seen, report["rounds"][0]["failed"]) == ({3}, 0)


def _check_budgets(report: dict[str, Any], name: str) -> None:
    (row,) = report["rounds"]
    assert row["failed"] == 0
    assert row["taking_part"] >= 2
    assert row["taking_part"] + row["refused_for_memory"] == 4
    assert row["bytes_down"] > row["bytes_up"] > 0 or row["refused_for_memory"] > 0 or name == "allsmall"
    assert row["simulated_seconds"] > 0
    for client in report["clients"]:
        if client["rounds"]:
            assert client["measured_peak_bytes"] <= client["budget_bytes"]
            assert client["planned_peak_bytes"] <= client["budget_bytes"]
            assert client["measured_peak_bytes"] == pytest.approx(client["planned_peak_bytes"], rel=0.01)
        assert client["fits"] or not client["rounds"]


def test_plans_let_everybody_take_part_and_change_no_number(config: RunConfig, run: Run) -> None:
    roomy = replace(config, fleet=config.fleet.replace("[0.75, 0.95]", "[1.0, 1.0]"))
    planned = run(config)
    unplanned = run(replace(roomy, method="fedavg"))
    assert planned["rounds"][0]["taking_part"] == unplanned["rounds"][0]["taking_part"] == 4
    tight = [c for c in planned["clients"] if c["device_class"] == "tight"]
    assert len(tight) == 2
    assert all(c["planned_peak_bytes"] < 0.95 * planned["unplanned_peak_bytes"] for c in tight)
    assert planned["loss"] == pytest.approx(unplanned["loss"], rel=1e-5)


def test_the_same_seed_repeats_itself_and_another_differs(config: RunConfig, run: Run) -> None:
    config = replace(config, method="fedavg")
    one, same, other = run(config), run_in_process(config), run(replace(config, seed=3))
    assert _figures(one) == _figures(same)
    assert one["loss"] != other["loss"]


def test_allsmall_narrows_the_model_until_the_weakest_client_fits(config: RunConfig, run: Run) -> None:
    report = run(replace(config, method="allsmall"))
    assert report["width"] < 1
    assert all(c["fits"] for c in report["clients"])
    assert report["rounds"][0]["taking_part"] == 4


def test_a_client_below_the_least_peak_is_told_and_counted(config: RunConfig) -> None:
    report = run_in_process(replace(config, fleet=config.fleet.replace("[0.75, 0.95]", "[0.1, 0.2]")))
    assert len(report["clients_without_memory"]) == 2
    assert report["rounds"][0]["refused_for_memory"] == 2
    assert report["rounds"][0]["asked"] == report["rounds"][0]["taking_part"] == 2


def test_what_cannot_be_run_says_so(config: RunConfig) -> None:
    with pytest.raises(FederatedError, match="no method 'best'; there are fedhybrid"):
        run_in_process(replace(config, method="best"))
    with pytest.raises(FederatedError, match="iid, dirichlet:ALPHA or pathological:CLASSES"):
        run_in_process(replace(config, partition="dirichlet"))
    with pytest.raises(FederatedError, match="no data 'letters'"):
        run_in_process(replace(config, data="letters"))
    with pytest.raises(FederatedError, match="per_round is 9, but there are 4 clients"):
        replace(config, per_round=9)


@pytest.mark.slow
@pytest.mark.ci
def test_the_double_gives_the_same_numbers_as_flwr_run(config: RunConfig) -> None:
    # Plans that round: two clients whose budgets need one, in processes that have run other steps before.
    fleet = config.fleet.replace("[0.75, 0.95]", "[0.6, 0.68]")
    both = replace(config, method="fedhybrid", codecs="lossy", fleet=fleet, points=5, rounds=2, per_round=3)
    events: list[str] = []
    engine = run_simulation(both, lambda event: events.append(event["event"])).json()
    assert events == ["start", "round", "round", "round", "end"]
    frontiers: dict[Hashable, Frontier] = {}
    double = run_in_process(both, made=frontiers)
    planned = {p.peak_bytes: p for f in frontiers.values() for p in f.plans}
    assert any(planned[c["planned_peak_bytes"]].noise > 0 for c in double["clients"] if c["rounds"])
    # A plan's text also says what its solver had proven when the clock stopped it: a few bytes.
    for one, other in zip(engine["rounds"], double["rounds"], strict=True):
        assert one.pop("bytes_down") == pytest.approx(other.pop("bytes_down"), rel=1e-3)
    assert _figures(engine) == _figures(double)
