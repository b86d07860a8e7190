"""Clients that misbehave: the round goes on with the others, and nothing is averaged that should not be."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MessageType

from graphplan.device import Device
from graphplan.federated import Frontier, RunConfig
from graphplan.federated import client as client_module
from graphplan.federated.execution import Order, Refused, Trainer, train
from graphplan.federated.plans import Execution, Planner, pack, unpack
from graphplan.federated.task import batches, task_of
from graphplan.federated.testing import InProcessGrid, run_in_process
from graphplan.plan import Plan, PlanFormatError

BAD = 1001  # the node that misbehaves: client 1
Run = Callable[[RunConfig], dict[str, Any]]
Frontiers = dict[Hashable, Frontier]
Fault = Callable[[InProcessGrid, Message], list[Message]]


class FaultyGrid(InProcessGrid):
    """Training replies of some nodes go through a fault of theirs."""

    def __init__(self, config: RunConfig, faults: Mapping[int, Fault]) -> None:
        super().__init__(config)
        self.faults, self.kept = faults, list[Message]()

    def deliver(self, message: Message) -> list[Message]:
        fault = self.faults.get(message.metadata.dst_node_id)
        if fault is not None and message.metadata.message_type == MessageType.TRAIN:
            return fault(self, message)
        return super().deliver(message)

    def good(self, message: Message) -> list[Message]:
        return super().deliver(message)


def _no_memory(grid: Any, message: Message) -> list[Message]:
    def raising(*_: object) -> Message:
        raise MemoryError("no memory")

    kept, grid.app = grid.app, raising
    try:
        return grid.good(message)
    finally:
        grid.app = kept


def _dies(grid: Any, message: Message) -> list[Message]:
    return []


def _gone(grid: Any, message: Message) -> list[Message]:
    return [Message(Error(code=1, reason="ClientApp stopped responding."), reply_to=message)]


def _late(grid: Any, message: Message) -> list[Message]:
    """The reply of a round arrives with the next one's."""
    kept, grid.kept = grid.kept, grid.good(message)
    return kept


def _nan(grid: Any, message: Message) -> list[Message]:
    (reply,) = grid.good(message)
    _spoil(reply, lambda a: np.full_like(a, np.nan))
    return [reply]


def _other_shape(grid: Any, message: Message) -> list[Message]:
    (reply,) = grid.good(message)
    _spoil(reply, lambda a: a[..., :1])
    return [reply]


def _pickled(grid: Any, message: Message) -> list[Message]:
    """An array that says it is something else than numpy's plain format must not reach any loader."""
    (reply,) = grid.good(message)
    key, array = next(iter(reply.content.array_records["arrays"].items()))
    data = Array(array.dtype, array.shape, "pickle", b"cos\nsystem\n(S'true'\ntR.")
    reply.content.array_records["arrays"][key] = data
    return [reply]


def _heavy(grid: Any, message: Message) -> list[Message]:
    (reply,) = grid.good(message)
    reply.content.metric_records["metrics"]["num-examples"] = -5
    return [reply]


def _spoil(reply: Message, how: Callable[[Any], Any]) -> None:
    arrays = reply.content.array_records["arrays"]
    key = next(k for k, a in arrays.items() if len(a.shape) > 1)
    reply.content["arrays"] = ArrayRecord({**arrays, key: Array(how(arrays[key].numpy()))})


FAULTS: tuple[tuple[Fault, str], ...] = (
    (_no_memory, "MemoryError: no memory"),
    (_dies, "no reply"),
    (_gone, "stopped responding"),
    (_nan, "not finite"),
    (_other_shape, "other names, shapes or types"),
    (_pickled, "not numpy's"),
    (_heavy, "num-examples is -5"),
)


def test_the_round_goes_on_without_the_clients_that_fail(config: RunConfig, frontiers: Frontiers) -> None:
    """Each of seven clients fails in its own way; the average is that of the two others alone."""
    everyone = replace(config, clients=9, per_round=9)
    faults = {BAD + i: fault for i, (fault, _) in enumerate(FAULTS)}
    report = run_in_process(everyone, FaultyGrid(everyone, faults), frontiers)
    (row,) = report["rounds"]
    assert (row["taking_part"], row["failed"], report["failed"]) == (2, 7, 7)
    for client, (_, said) in enumerate(FAULTS, start=1):
        (message,) = (m for m in row["messages"] if m.startswith(f"client {client} failed"))
        assert said in message
    assert row["clients"] == [0, 8]
    absent = run_in_process(everyone, FaultyGrid(everyone, dict.fromkeys(faults, _dies)), frontiers)
    assert report["loss"] == absent["loss"]


def test_a_reply_that_comes_twice_counts_once(config: RunConfig, run: Run, frontiers: Frontiers) -> None:
    report = run_in_process(config, FaultyGrid(config, {BAD: lambda grid, m: grid.good(m) * 2}), frontiers)
    assert report["rounds"][0]["messages"] == [f"node {BAD} replied twice"]
    assert report["rounds"][0]["taking_part"] == 4
    assert report["loss"] == run(config)["loss"]


def test_a_reply_that_comes_late_is_not_averaged(config: RunConfig, frontiers: Frontiers) -> None:
    config = replace(config, rounds=2)
    first, second = run_in_process(config, FaultyGrid(config, {BAD: _late}), frontiers)["rounds"]
    assert first["failed"] == second["failed"] == 1
    assert f"node {BAD} replied for round 1 in round 2" in second["messages"]


def test_a_node_that_restarts_is_met_again(config: RunConfig, frontiers: Frontiers) -> None:
    """A SuperNode that comes back has another node id; the client keeps its data and takes part again."""
    config = replace(config, rounds=3)
    restarted = BAD + 500

    def restart(grid: Any, message: Message) -> list[Message]:
        if grid.contexts.get(BAD) is None:
            return []
        context = grid.contexts.pop(BAD)
        grid.contexts[restarted] = Context(1, restarted, context.node_config, type(context.state)(), context.run_config)
        return []

    first, second, third = run_in_process(config, FaultyGrid(config, {BAD: restart}), frontiers)["rounds"]
    assert (first["taking_part"], first["failed"]) == (3, 1)
    assert (second["taking_part"], third["taking_part"]) == (4, 4)


def test_tampered_plans_are_refused_and_made_again_by_the_client(
    config: RunConfig, run: Run, frontiers: Frontiers
) -> None:
    def tamper(grid: Any, message: Message) -> list[Message]:
        plans = unpack(message.content.config_records["config"]["plans"])
        worse = [replace(p, steps=p.steps[:5] + p.steps[6:]) for p in plans]
        message.content.config_records["config"]["plans"] = pack(p.to_json() for p in worse)
        return grid.good(message)

    report = run_in_process(config, FaultyGrid(config, {BAD: tamper}), frontiers)
    assert report["rounds"][0]["taking_part"] == 4
    assert report["rounds"][0]["planned_on_client"] == 1
    # The plan made by the client trains the same numbers.
    assert report["loss"] == pytest.approx(run(config)["loss"], rel=1e-6)


def test_plans_that_are_cut_off_or_blow_up_are_refused() -> None:
    import zlib

    for data, said in (
        (zlib.compress(b'["x"]')[:-3], "cut off"),
        (zlib.compress(b" " * (9 << 20)), "unpack to more"),
        (b"\x80\x04K\x01.", "damaged"),
        (zlib.compress(b'{"a": 1}'), "list of plans"),
        (zlib.compress(b'["{}"]'), "not a plan"),
    ):
        with pytest.raises(PlanFormatError, match=said):
            unpack(data)


@pytest.fixture
def trainer(config: RunConfig) -> Iterator[Trainer]:
    """As a client has it, on the threads that its device was profiled on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(Device.load(config.device).threads)
    yield client_module._trainer(config, 1.0)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def plans(config: RunConfig, frontiers: Frontiers) -> tuple[Plan, ...]:
    devices = {"": Device.load(config.device)}
    return Planner(task_of(config), Execution(), config, devices, frontiers).frontier("").below(1 << 40, 5)


def test_a_budget_that_shrinks_inside_a_round_moves_to_a_smaller_plan(
    config: RunConfig, trainer: Trainer, plans: tuple[Plan, ...]
) -> None:
    assert len(plans) > 1
    work = tuple(batches(trainer.task.train, config.batch, 1, "a"))[:6]
    asked: list[int] = []

    def shrinking() -> int:
        asked.append(1)
        return plans[0].peak_bytes if len(asked) <= 3 else plans[-1].peak_bytes

    weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    outcome = train(trainer, work, Order(plans, 0, 0.05), shrinking)
    moved = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    assert (outcome.moves, outcome.steps) == (1, 6)
    assert outcome.planned_peak_bytes == plans[-1].peak_bytes
    assert outcome.measured_peak_bytes <= plans[-1].peak_bytes
    trainer.model.load_state_dict(weights)
    train(trainer, work, Order(plans, 0, 0.05), lambda: plans[0].peak_bytes)
    for key, value in trainer.model.state_dict().items():
        assert value.equal(moved[key]), key  # another point of the frontier, the same training


def test_a_budget_that_shrinks_below_every_plan_ends_the_clients_round(
    config: RunConfig, trainer: Trainer, plans: tuple[Plan, ...]
) -> None:
    budgets = iter([plans[0].peak_bytes] * 2)
    work = tuple(batches(trainer.task.train, config.batch, 1, "a"))[:6]
    with pytest.raises(Refused) as caught:
        train(trainer, work, Order(plans, 0, 0.05), lambda: next(budgets, 1000))
    assert caught.value.needed_bytes == plans[-1].peak_bytes


def test_a_budget_file_is_read_while_training_runs(
    config: RunConfig, plans: tuple[Plan, ...], frontiers: Frontiers, tmp_path: Path
) -> None:
    """The operator's file shrinks between rounds: the server sends a smaller plan."""
    file = tmp_path / "budget"
    config = replace(config, rounds=2)
    least, *_, most = sorted(p.peak_bytes for p in plans)
    file.write_text(str(most))

    def shrink(grid: Any, message: Message) -> list[Message]:
        file.write_text(str(least))
        return grid.good(message)

    grid = FaultyGrid(config, {BAD: shrink})
    grid.contexts[BAD].node_config["memory-budget-file"] = str(file)
    report = run_in_process(config, grid, frontiers)
    client = next(c for c in report["clients"] if c["client"] == 1)
    assert (client["rounds"], client["budget_source"], client["budget_bytes"]) == (2, "file", least)
    assert client["measured_peak_bytes"] <= least


def test_no_reply_is_waited_for_longer_than_asked(config: RunConfig) -> None:
    """Clients that never connect end the run with a message, not a hang."""
    grid = InProcessGrid(config)
    del grid.contexts[BAD]
    with pytest.raises(Exception, match="3 of 4 clients have connected after 1 s"):
        run_in_process(replace(config, timeout=1.0), grid)
