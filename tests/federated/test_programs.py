"""Whole steps, and clients that have not the model's source: the same numbers, less memory, nothing believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import Message

from graphplan.federated import FederatedError, Frontier, RunConfig, client
from graphplan.federated.carried import read_programs
from graphplan.federated.plans import Execution, Planner, pack, unpack_texts
from graphplan.federated.task import task_of
from graphplan.federated.testing import InProcessGrid, run_in_process
from graphplan.program import ProgramTooLarge

Run = Callable[[RunConfig], dict[str, Any]]


def _numbers(report: dict[str, Any]) -> Any:
    return [(r["accuracy"], r["loss"], r["clients"]) for r in report["rounds"]]


@pytest.fixture
def two_rounds(config: RunConfig) -> RunConfig:
    return replace(config, rounds=2)


def test_whole_steps_change_no_number_and_take_less_memory(
    two_rounds: RunConfig, run: Run, frontiers: dict[Any, Frontier]
) -> None:
    plans, steps = run(two_rounds), run(replace(two_rounds, step=True))
    assert _numbers(steps) == _numbers(plans)
    assert all(c["measured_peak_bytes"] <= c["budget_bytes"] for c in steps["clients"])
    least = {execution.whole: f.peaks[0] for (_, execution), f in frontiers.items() if execution.hybrid}
    assert least[True] < least[False]


def test_programs_need_no_source_and_change_no_number(
    two_rounds: RunConfig, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = run(replace(two_rounds, step=True))

    def no_source(*_: object) -> None:
        raise AssertionError("the client asked for the model's source")

    monkeypatch.setattr(client, "task_of", no_source)
    sent = run_in_process(replace(two_rounds, program=True))
    assert _numbers(sent) == _numbers(steps)
    assert [c["measured_peak_bytes"] for c in sent["clients"]] == [c["measured_peak_bytes"] for c in steps["clients"]]
    assert all(r["taking_part"] == 4 for r in sent["rounds"])
    assert all(a["bytes_down"] > b["bytes_down"] for a, b in zip(sent["rounds"], steps["rounds"], strict=True))


class _Tampering(InProcessGrid):
    """One client's program calls something else."""

    def deliver(self, message: Message) -> list[Message]:
        record = message.content.config_records.get("config")
        if message.metadata.dst_node_id == 1001 and record is not None and "plans" in record:
            texts = unpack_texts(record["plans"])  # type: ignore[arg-type]
            programs = [json.loads(t) for t in texts]
            for p in programs:
                p["calls"][0][0] = "os.system"
            record["plans"] = pack(json.dumps(p) for p in programs)
        return super().deliver(message)


def test_a_tampered_program_is_refused_and_the_round_goes_on(two_rounds: RunConfig) -> None:
    config = replace(two_rounds, program=True, rounds=1)
    report = run_in_process(config, _Tampering(config))
    assert [(r["taking_part"], r["failed"]) for r in report["rounds"]] == [(3, 1)]
    assert "not on programs' list" in report["rounds"][0]["messages"][0]


def test_a_client_takes_the_programs_that_fit_and_no_other(config: RunConfig) -> None:
    config = replace(config, program=True)
    planner = Planner(task_of(config), Execution().under(config), config)
    frontier = planner.frontier("")
    data = planner.packed("", frontier.peaks[-1])
    everything = read_programs(data, frontier.peaks[-1])
    assert [p.peak_bytes for p in everything] == sorted(frontier.peaks, reverse=True)
    fewer = read_programs(data, everything[0].floor_bytes - 1)
    assert 0 < len(fewer) < len(everything)
    with pytest.raises(ProgramTooLarge):
        read_programs(data, everything[-1].floor_bytes - 1)


def test_what_programs_cannot_do_says_so(config: RunConfig) -> None:
    with pytest.raises(FederatedError, match="needs the model's source"):
        run_in_process(replace(config, method="fedavg", program=True))
    with pytest.raises(FederatedError, match="exact codecs"):
        run_in_process(replace(config, method="compress_only", program=True))
