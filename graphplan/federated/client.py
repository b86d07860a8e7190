"""The ClientApp: answers what it is (QUERY), executes plans (TRAIN), and says how that went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from graphplan.device import Device
from graphplan.errors import PlanFormatError, PlanMismatch
from graphplan.federated.budget import Budget, predict, read_budget
from graphplan.federated.carried import Carried, read_programs
from graphplan.federated.config import RunConfig
from graphplan.federated.data import Images
from graphplan.federated.execution import Order, Outcome, Refused, Sized, Trainer, Trains, train
from graphplan.federated.fleet import draw, read_fleet
from graphplan.federated.methods import METHODS
from graphplan.federated.plans import unpack
from graphplan.federated.shrink import same_shapes
from graphplan.federated.task import batches, images_of, number_of, share_of, task_of
from graphplan.program import ProgramTooLarge

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which client this is, what it may use, and what data it has."""
    config = RunConfig.of(context.run_config)
    client = _client(context)
    # A client that has not the model's source counts its images without knowing their shape in the model.
    train = images_of(config.data, None)[0] if config.program else task_of(config).train
    share = share_of(config, train, client)
    told = message.content.config_records["config"]
    budget, source = _budget(config, context, _integer(told["unplanned-bytes"]), 0)
    device = _profile(config)
    facts = {
        "client": client,
        "budget_bytes": _observe(context, budget()),
        "budget_source": source,
        "examples": len(share.labels),
        "labels": torch.bincount(share.labels, minlength=train.classes).tolist(),
        "device_class": "" if device is None else f"{device.name}/{device.threads}/{device.torch_version}",
        "device": "" if device is None else device.to_json(),
    }
    return Message(RecordDict({"facts": ConfigRecord({"facts": json.dumps(facts)})}), reply_to=message)


@app.query("refusal")
def refusal(message: Message, context: Context) -> Message:
    """Take note that nothing fits this client's budget, and what would."""
    context.state["refusal"] = message.content.config_records["config"]
    return Message(RecordDict({"facts": ConfigRecord({"noted": True})}), reply_to=message)


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Train this round's epochs as the plan says; refuse where the memory is not there."""
    config = RunConfig.of(context.run_config)
    client, told = _client(context), message.content.config_records["config"]
    server_round = _integer(told["server-round"])
    unplanned = _integer(told["unplanned-bytes"])
    budget, _ = _budget(config, context, _integer(told["fleet-bytes"]), server_round)
    reserved = _integer(told["reserved-bytes"])
    torch.set_num_threads(_integer(told["threads"]))  # as the plan counts on: kernels' scratch depends on it
    seed = f"{config.seed}/{client}/{server_round}"
    torch.manual_seed(number_of(seed))  # for models that draw random numbers
    report: dict[str, Any] = {"outcome": "trained", "reason": ""}
    try:
        side = _carried if config.program else _own
        trainer, plans, share, report["reason"] = side(config, told, client, budget() - reserved)
        state = message.content.array_records["arrays"].to_torch_state_dict()
        if not same_shapes(trainer.model, state):
            raise ValueError("the received weights are of another model than this client's")
        trainer.model.load_state_dict(state)
        order = Order(plans, unplanned, config.learning_rate, _real(told["proximal-mu"]), config.cap)
        work = tuple(batches(share, config.batch, config.local_epochs, seed))
        outcome = train(trainer, work, order, lambda: budget() - reserved)
    except Refused as e:
        report.update(outcome="refused", reason=str(e), needed=e.needed_bytes)
        return Message(RecordDict({"report": ConfigRecord(report)}), reply_to=message)
    report["budget"] = _observe(context, budget())
    content = RecordDict(
        {
            "arrays": ArrayRecord(trainer.model.state_dict()),
            "metrics": _metrics(outcome, len(share.labels), server_round),
            "report": ConfigRecord(report),
        }
    )
    return Message(content, reply_to=message)


Side = tuple[Trains, Sequence[Sized], Images, str]  # who trains, what it was sent, its images, why it planned here


def _own(config: RunConfig, told: ConfigRecord, client: int, budget_bytes: int) -> Side:
    """Return what trains the model of this client's own source, by the received plans or one made here."""
    trainer = _trainer(config, _real(told["width"]))
    share, data = share_of(config, trainer.task.train, client), told["plans"]
    if not isinstance(data, bytes) or not data:
        return trainer, (), share, ""
    try:
        plans = unpack(data)
        fitting = next((p for p in plans if p.peak_bytes <= budget_bytes), None)
        trainer.program(fitting or plans[-1])
        return trainer, plans, share, ""
    except (PlanFormatError, PlanMismatch) as e:
        whole = METHODS[config.method].execution.under(config).whole
        return trainer, (trainer.plan_here(budget_bytes, whole),), share, f"planned here: {e}"


def _carried(config: RunConfig, told: ConfigRecord, client: int, budget_bytes: int) -> Side:
    """Return what trains by the received programs alone; there is nothing here to plan with.

    Raises:
        Refused: none of them fits.
        ProgramError, PlanFormatError: a damaged or hostile one.
    """
    data = told["plans"]
    try:
        carried = _programs(data if isinstance(data, bytes) else b"", max(1, budget_bytes), config.data)
    except ProgramTooLarge as e:
        raise Refused(f"no program that came along fits: {e}", _integer(told["unplanned-bytes"])) from e
    shape = carried.programs[0].inputs[0].shape[1:]
    return carried, carried.programs, share_of(config, images_of(config.data, shape)[0], client), ""


@lru_cache(maxsize=2)
def _programs(data: bytes, most_bytes: int, name: str) -> Carried:
    programs = read_programs(data, most_bytes)
    train = images_of(name, programs[0].inputs[0].shape[1:])[0]
    rows = torch.arange(programs[0].inputs[0].shape[0]) % len(train.labels)
    return Carried(programs, (train.images[rows], train.labels[rows]))


def _metrics(outcome: Outcome, examples: int, server_round: int) -> MetricRecord:
    return MetricRecord(
        {
            "num-examples": examples,
            "server-round": server_round,
            "steps": outcome.steps,
            "loss": outcome.loss,
            "squared-loss": outcome.squared_loss,
            "step-ns": outcome.step_ns,
            "planned-peak-bytes": outcome.planned_peak_bytes,
            "measured-peak-bytes": outcome.measured_peak_bytes,
            "rss-growth-bytes": outcome.rss_growth_bytes,
            "moves": outcome.moves,
        }
    )


@lru_cache(maxsize=2)
def _trainer(config: RunConfig, width: float) -> Trainer:
    return Trainer(task_of(config, width), _device(config.device))


def _device(path: str) -> Device | None:
    return Device.load(Path(path)) if path else None


def _profile(config: RunConfig) -> Device | None:
    """Return what this machine measured of the task's ops; None in a simulation, and without the model's source."""
    if config.fleet or config.device or config.program:
        return None
    execution = METHODS[config.method].execution.under(config)
    return _trainer(config, 1.0).profile(execution.codecs, whole=execution.whole, forms=execution.forms)


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _budget(config: RunConfig, context: Context, unplanned_bytes: int, server_round: int) -> tuple[Budget, str]:
    """Return how to ask for the present budget, and where it comes from.

    Free memory is read once a round: what training itself takes would look like a smaller budget.
    """
    stated = context.node_config.keys() & {"memory-budget", "memory-budget-file"}
    if config.fleet and not stated:
        member = draw(read_fleet(config.fleet), config.clients, config.seed)[_client(context)]
        found = member.budget_bytes(unplanned_bytes, config.seed, _client(context), server_round)
        return lambda: found, f"fleet class {member.of.name}"
    first, source = read_budget(context.node_config)
    if "memory-budget-file" in stated:
        return lambda: read_budget(context.node_config)[0], source
    return lambda: first, source


def _observe(context: Context, budget_bytes: int) -> int:
    """Remember a budget in the client's state, and return the prediction for the next round."""
    record = context.state.metric_records.get("budgets")
    seen = record["observed"] if record is not None else []
    observed = [*(int(n) for n in seen), budget_bytes] if isinstance(seen, list) else [budget_bytes]
    context.state["budgets"] = MetricRecord({"observed": observed[-32:]})
    return predict(observed)


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"expected a whole number, got {value!r}")
    return value


def _real(value: object) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"expected a number, got {value!r}")
    return float(value)
