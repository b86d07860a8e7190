"""fl run and fl up: federated clients execute plans, on Flower. Flower is imported when a command runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from graphplan.cli.output import BROKEN, EXIT_CODES, AsJson, BadInput, answering, show, show_json
from graphplan.cli.tables import grid
from graphplan.units import check_budget, format_bytes

SHOWN = 12  # clients listed

Method = Annotated[str, typer.Option(help="A federated system: `graphplan fl methods` lists them.")]
Model = Annotated[str, typer.Option(help="models_zoo:NAME, package.module:factory or file.py:factory.")]
Data = Annotated[str, typer.Option(help="digits, synthetic, or cifar10 and femnist where the network allows.")]
Partition = Annotated[str, typer.Option(help="iid, dirichlet:ALPHA or pathological:CLASSES.")]
PerRound = Annotated[int, typer.Option(min=1, help="Clients asked in a round.")]
Rounds = Annotated[int, typer.Option(min=1)]
Batch = Annotated[int, typer.Option(min=1, help="Local batch size.")]
Epochs = Annotated[int, typer.Option(min=1, help="Local epochs of a round.")]
Rate = Annotated[float, typer.Option(help="Local learning rate (SGD).")]
Size = Annotated[str, typer.Option(help='"small" or "real": which size of a models_zoo model.')]
Codecs = Annotated[
    str, typer.Option(help="Of hybrid plans: none, exact or lossy (rounds). Default: lossy; whole steps: exact.")
]
Forms = Annotated[
    bool,
    typer.Option("--forms/--no-forms", help="Hybrid: whole steps in every form, on parts of the batch: least memory."),
]
Step = Annotated[bool, typer.Option("--step/--no-step", help="Plan whole steps, the update included.")]
Program = Annotated[
    bool, typer.Option("--program/--no-program", help="Send programs, for clients that have not the model's source.")
]
Device = Annotated[
    Path | None, typer.Option(help="A saved profile (graphplan profile --out) that all clients are like.")
]


def run(
    method: Method = "fedhybrid",
    model: Model = "models_zoo:resnet18",
    data: Data = "digits",
    partition: Partition = "dirichlet:0.1",
    clients: Annotated[int, typer.Option(min=1, help="Simulated clients.")] = 8,
    per_round: PerRound = 4,
    rounds: Rounds = 3,
    seed: int = 0,
    fleet: Annotated[Path | None, typer.Option(help="A fleet file (TOML); without it, three built-in classes.")] = None,
    batch: Batch = 16,
    local_epochs: Epochs = 1,
    learning_rate: Rate = 0.05,
    size: Size = "small",
    device: Device = None,
    cap: Annotated[bool, typer.Option("--cap/--no-cap", help="Train under RLIMIT_DATA at each budget.")] = False,
    codecs: Codecs = "",
    step: Step = False,
    forms: Forms = False,
    program: Program = False,
    as_json: AsJson = None,
) -> None:
    """Simulate a federation with `flwr run`; 4 when a client's reply is missing or failed."""
    with answering(as_json) as json_wanted:
        federated = _federated()
        text = federated.DEFAULT_FLEET if fleet is None else _read(fleet)
        federated.read_fleet(text)
        config = federated.RunConfig(
            method=_known(method, federated), model=_absolute(model), size=size, data=data, partition=partition,
            clients=clients, per_round=per_round, rounds=rounds, seed=seed, fleet=text, batch=batch,
            local_epochs=local_epochs, learning_rate=learning_rate, cap=cap, device=_path(device),
            codecs=codecs, step=step, forms=forms, program=program,
        )  # fmt: skip
        launch = importlib.import_module("graphplan.federated.launch")
        _finish(launch.run_simulation(config, _listener(json_wanted)), json_wanted)


def up(
    budget: Annotated[list[str], typer.Option(help="A SuperNode with this memory budget, e.g. 64MiB; repeat.")],
    method: Method = "fedhybrid",
    model: Model = "models_zoo:resnet18",
    data: Data = "digits",
    partition: Partition = "iid",
    per_round: Annotated[int | None, typer.Option(min=1, help="Clients asked in a round; without it, all.")] = None,
    rounds: Rounds = 2,
    seed: int = 0,
    batch: Batch = 16,
    local_epochs: Epochs = 1,
    learning_rate: Rate = 0.05,
    size: Size = "small",
    device: Device = None,
    cap: Annotated[bool, typer.Option("--cap/--no-cap", help="Train under RLIMIT_DATA at each budget.")] = False,
    codecs: Codecs = "",
    step: Step = False,
    forms: Forms = False,
    program: Program = False,
    as_json: AsJson = None,
) -> None:
    """Start a SuperLink and one SuperNode a budget on loopback, run the app on them, and take them down."""
    with answering(as_json) as json_wanted:
        federated = _federated()
        for b in budget:
            check_budget(int(b) if b.isdecimal() else b)
        config = federated.RunConfig(
            method=_known(method, federated), model=_absolute(model), size=size, data=data, partition=partition,
            clients=len(budget), per_round=per_round or len(budget), rounds=rounds, seed=seed, batch=batch,
            local_epochs=local_epochs, learning_rate=learning_rate, cap=cap, device=_path(device),
            codecs=codecs, step=step, forms=forms, program=program,
        )  # fmt: skip
        launch = importlib.import_module("graphplan.federated.launch")
        _finish(launch.run_deployment(config, budget, _listener(json_wanted)), json_wanted)


def methods(as_json: AsJson = None) -> None:
    """List the federated systems."""
    with answering(as_json) as json_wanted:
        table = _federated().METHODS
        if json_wanted:
            show_json({"command": "fl methods", "methods": {k: m.description for k, m in table.items()}})
            return
        rows = grid("Methods", ("name", "left"), ("what it does", "left"))
        for name, m in table.items():
            rows.add_row(name, m.description)
        show(rows)


COMMANDS: dict[str, Callable[..., None]] = {"run": run, "up": up, "methods": methods}
fl_app = typer.Typer(name="fl", help="Federated clients execute plans, on Flower.", no_args_is_help=True)
for _name, _function in COMMANDS.items():
    fl_app.command(_name, epilog=EXIT_CODES)(_function)


def _federated() -> Any:
    try:
        return importlib.import_module("graphplan.federated")
    except ModuleNotFoundError as e:
        if e.name != "flwr":
            raise
        raise BadInput("fl needs Flower: pip install 'graphplan[federated]'") from e


def _known(method: str, federated: Any) -> str:
    if method not in federated.METHODS:
        raise BadInput(f"no method {method!r}; there are {', '.join(federated.METHODS)}")
    return method


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as e:
        raise BadInput(f"--fleet {path}: {e.strerror}") from e


def _path(path: Path | None) -> str:
    if path is None:
        return ""
    if not path.is_file():
        raise BadInput(f"no file {str(path)!r}")
    return str(path.resolve())


def _absolute(model: str) -> str:
    """Flower's processes run elsewhere: a model's file is named in full."""
    place, colon, factory = model.rpartition(":")
    return f"{Path(place).resolve()}{colon}{factory}" if place.endswith(".py") else model


def _listener(json_wanted: bool) -> Any:
    """Return what shows each round as it ends; nothing where JSON is wanted at the end."""
    heading = f"{'round':>5}  {'accuracy':>8}  {'loss':>8}  {'simulated s':>11}  asked/part/refused/failed"

    def listen(event: dict[str, Any]) -> None:
        if json_wanted or event["event"] == "end":
            return
        if event["event"] == "start":
            show(f"{event['method']}: {event['model']} on {event['data']}, {event['clients_known']} clients", heading)
        elif event["event"] == "round" and event["round"]:
            counts = "/".join(str(event[k]) for k in ("asked", "taking_part", "refused_for_memory", "failed"))
            figures = f"{event['accuracy']:>8.3f}  {event['loss']:>8.4f}  {event['simulated_seconds']:>11.2f}"
            show(f"{event['round']:>5}  {figures}  {counts}", *(f"       {m}" for m in event["messages"]))

    return listen


def _finish(report: Any, json_wanted: bool) -> None:
    """Show the report; exit as its error or its missing replies demand."""
    if report.error is not None:
        raise BadInput(f"{report.error['kind']}: {report.error['message']}")
    if json_wanted:
        show_json(report.json())
    else:
        show(_clients(report.clients), report.json()["note"])
    if report.failed:
        raise typer.Exit(BROKEN)


def _clients(rows: list[dict[str, Any]]) -> Any:
    columns = [("budget", "right"), ("planned peak", "right"), ("measured peak", "right"), ("rounds", "right")]
    table = grid("Clients", ("client", "right"), ("class", "left"), *columns, ("", "left"))
    for row in rows[:SHOWN]:
        sizes = (row["budget_bytes"], row["planned_peak_bytes"], row["measured_peak_bytes"])
        shown = ["-" if n is None else format_bytes(n) for n in sizes]
        note = "" if row["fits"] else "nothing fits"
        table.add_row(str(row["client"]), row["device_class"], *shown, str(row["rounds"]), note)
    if len(rows) > SHOWN:
        table.add_row("...", f"{len(rows) - SHOWN} more", "", "", "", "", "")
    return table
