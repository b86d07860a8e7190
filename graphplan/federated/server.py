"""The ServerApp: meets the clients, settles the model's width, runs the method's rounds, writes what happened."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from graphplan.codecs import choose_codecs
from graphplan.device import Device
from graphplan.errors import GraphplanError
from graphplan.federated.config import FederatedError, RunConfig
from graphplan.federated.frontier import Frontier
from graphplan.federated.method import Method
from graphplan.federated.methods import METHODS
from graphplan.federated.plans import Execution, Planner
from graphplan.federated.strategy import Client, Emit, PlannedStrategy, ask_facts, wait_for_nodes
from graphplan.federated.task import task_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config says; its events go to the file `out`, one JSON object a line."""
    config = RunConfig.of(context.run_config)
    out = Path(config.out) if config.out else None

    def emit(event: dict[str, Any]) -> None:
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(event) + "\n")

    try:
        serve(grid, config, emit)
    except GraphplanError as e:
        emit({"event": "error", "kind": type(e).__name__, "message": str(e)})
        raise


def serve(grid: Grid, config: RunConfig, emit: Emit, made: dict[Hashable, Frontier] | None = None) -> ArrayRecord:
    """Run one method on the clients behind `grid` and return the final weights.

    `made` holds frontiers of earlier runs of the same task on the same device, and receives those of this one.

    Raises:
        FederatedError: an unknown method, or clients that do not come.
    """
    if config.method not in METHODS:
        raise FederatedError(f"no method {config.method!r}; there are {', '.join(METHODS)}")
    method = METHODS[config.method]
    method = replace(method, execution=method.execution.under(config))
    _check_whole(method, config)
    task_of(config).check(config)
    wait_for_nodes(grid, config.clients, config.timeout)
    # In a simulation all clients are of one class, whose device may be given.
    devices = {"": Device.load(Path(config.device))} if config.device else {}
    whole = Planner(task_of(config), method.execution, config, devices, {} if made is None else made)
    unplanned = _unplanned(config, devices)
    clients = ask_facts(grid, sorted(grid.get_node_ids()), unplanned, config, whole)
    if not clients:
        raise FederatedError("no client said what it is: see the log for what each answered")
    width, planner = _settle(method, config, whole, clients)
    strategy = PlannedStrategy(config, method, planner, width, unplanned, emit)
    strategy.clients = {c.node: c for c in clients}
    _announce(strategy, emit)
    strategy.tell_unfit(grid)
    task = planner.task
    model = task.fresh()

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        accuracy, loss = task.evaluate(model)
        strategy.finish_round(server_round, accuracy, loss)
        return MetricRecord({"accuracy": accuracy, "loss": loss})

    initial = ArrayRecord(task.model.state_dict())
    strategy.arrays = initial
    result = strategy.start(grid, initial, config.rounds, config.timeout, evaluate_fn=evaluate)
    emit({"event": "end", "clients": [_client_row(strategy, c) for c in _in_order(strategy)]})
    return result.arrays


def _check_whole(method: Method, config: RunConfig) -> None:
    execution = method.execution
    if config.program and not execution.planned:
        raise FederatedError(f"method {method.name} runs plain PyTorch, which needs the model's source: no programs")
    if config.program and not all(c.exact for c in choose_codecs(execution.codecs)):
        raise FederatedError(f"method {method.name} rounds activations; programs take exact codecs only")


def _unplanned(config: RunConfig, devices: dict[str, Device]) -> int:
    """Return plain PyTorch's peak of the whole model, of which a fleet's budgets may be fractions: for all methods."""
    plain = Planner(task_of(config), Execution(planned=False), config, devices)
    return plain.unplanned("").baseline_peak_bytes if config.fleet else 0


def _settle(method: Method, config: RunConfig, whole: Planner, clients: list[Client]) -> tuple[float, Planner]:
    """Return the first width of the method at which every client with data can train, else its last."""
    if method.widths == (1.0,):
        return 1.0, whole
    for width in method.widths:
        # A saved profile knows nothing of narrower ops, whose scratch cannot be guessed: they are measured here.
        planner = whole if width == 1 else Planner(task_of(config, width), method.execution, config)
        if all(planner.for_budget(c.device_class, c.budget_bytes) for c in clients if c.examples):
            break
    return width, planner


def _announce(strategy: PlannedStrategy, emit: Emit) -> None:
    config, task = strategy.config, strategy.planner.task
    emit(
        {
            "event": "start",
            "method": config.method,
            "model": config.model,
            "data": config.data,
            "synthetic_data": task.train.synthetic,
            "partition": config.partition,
            "seed": config.seed,
            "width": strategy.width,
            "unplanned_peak_bytes": strategy.fleet_bytes or None,
            "clients_known": len(strategy.clients),
            "clients_silent": config.clients - len(strategy.clients),
            "clients_without_data": sum(not c.examples for c in strategy.clients.values()),
            "clients_without_memory": sorted(c.client for c in strategy.unfit()),
        }
    )


def _in_order(strategy: PlannedStrategy) -> list[Client]:
    return sorted(strategy.clients.values(), key=lambda c: c.client)


def _client_row(strategy: PlannedStrategy, client: Client) -> dict[str, Any]:
    return {
        "client": client.client,
        "budget_bytes": client.budget_bytes,
        "budget_source": client.budget_source,
        "planned_peak_bytes": client.planned_peak_bytes,
        "measured_peak_bytes": client.measured_peak_bytes,
        "examples": client.examples,
        "device_class": strategy.members[client.client].of.name if strategy.members else client.device_class,
        "fits": bool(strategy.plans_of(client)),
        "rounds": client.rounds,
        **{k: client.last.get(k) for k in ("step_ns", "rss_growth_bytes", "moves")},
    }
