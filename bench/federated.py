"""Every method on a fleet of 100 clients, five seeds: `python -m bench.federated [--seeds 0 1] [--write PAGE]`.

Runs on the in-process double of Flower's grid, which gives the same numbers as `flwr run` (a test shows it). Rows are
kept in bench/results, so that runs add up; `--write` renders what is there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from bench.page import write_between
from bench.processes import RESULTS, ROOT

OUT, DEVICE = RESULTS / "federated.jsonl", RESULTS / "federated_device.json"
PLOT = ROOT / "docs" / "plots" / "federated.svg"
SEEDS, ROUNDS, CLIENTS, PER_ROUND = range(5), 60, 100, 10
OPTIONS = ("codecs exact", "forms")  # of a method, beside it: exact plans; whole steps in every form
TARGETS = (0.5, 0.8)
LAST = 5  # rounds whose mean is the final accuracy
FLEET = "".join(
    f'[[class]]\nname = "{name}"\nshare = {share}\nmemory = [0.2, 1.1]\nspeed = {speed}\n'
    f"uplink_mbps = {up}\ndownlink_mbps = {down}\n\n"
    for name, share, speed, up, down in (
        ("slow", 0.4, 0.25, 2.0, 10.0),
        ("middle", 0.4, 0.5, 8.0, 40.0),
        ("fast", 0.2, 1.0, 20.0, 100.0),
    )
)
Row = dict[str, Any]
FRONTIERS: dict[Any, Any] = {}  # of plans that do not depend on the seed's weights


def run(method: str, seed: int) -> Row:
    from graphplan.federated import METHODS, RunConfig
    from graphplan.federated.testing import run_in_process

    name, *options = method.split(", ")
    codecs = next((o.removeprefix("codecs ") for o in options if o.startswith("codecs ")), "")
    config = RunConfig(
        method=name, codecs=codecs, model="models_zoo:cnn", partition="dirichlet:0.1", clients=CLIENTS,
        per_round=PER_ROUND, rounds=ROUNDS, seed=seed, fleet=FLEET, local_epochs=5, points=16, time_limit=60.0,
        device=str(DEVICE), forms="forms" in options,
    )  # fmt: skip
    start = time.perf_counter()
    rounding = name == "compress_only" or (METHODS[name].execution.hybrid and not options)
    report = run_in_process(config, made=None if rounding else FRONTIERS)
    clock, accuracy, seconds = 0.0, [], []
    for row in report["rounds"]:
        clock += row["simulated_seconds"]
        accuracy.append(row["accuracy"])
        seconds.append(clock)
    able = sum(c["fits"] and c["examples"] > 0 for c in report["clients"])
    return {
        "method": method,
        "seed": seed,
        "accuracy": accuracy,
        "seconds": seconds,
        "able": able,
        "with_data": sum(c["examples"] > 0 for c in report["clients"]),
        "met": sum(c["rounds"] > 0 for c in report["clients"]),
        "failed": report["failed"],
        "over_budget": sum((c["measured_peak_bytes"] or 0) > c["budget_bytes"] for c in report["clients"]),
        "width": report["width"],
        "wall": time.perf_counter() - start,
    }


def rows() -> list[Row]:
    """Return what is stored, the last of each (method, seed)."""
    found = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []
    return list({(r["method"], r["seed"]): r for r in found}.values())


def profile() -> None:
    """Profile the model once, on one thread, as Flower's engine gives a client: all runs have one clock and its plans.

    On two, these small convolutions mostly wait for each other, and two runs on two cores for a core.
    """
    import torch

    from graphplan.device import Device
    from graphplan.federated import RunConfig
    from graphplan.federated.execution import Trainer, measure_ops
    from graphplan.federated.task import task_of

    OUT.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    task = task_of(RunConfig(model="models_zoo:cnn"))
    found = Device.load(DEVICE) if DEVICE.exists() else Trainer(task).profile()
    measure_ops(task, found, "exact", whole=True, forms=True)
    found.save(DEVICE)


def table(found: list[Row]) -> str:
    heads = " | ".join(f"simulated s to {t:.0%}" for t in TARGETS)
    lines = [
        f"| method | accuracy at {ROUNDS // 2} rounds | at {ROUNDS} | {heads} | able to take part | took part |",
        "|---" * (5 + len(TARGETS)) + "|",
    ]
    for method in dict.fromkeys(r["method"] for r in found):
        mine = [r for r in found if r["method"] == method]
        spread = " | ".join(_spread(mine, end) for end in (ROUNDS // 2, ROUNDS))
        times = " | ".join(_time(mine, t) for t in TARGETS)
        able, met, data = (statistics.fmean(r[k] for r in mine) for k in ("able", "met", "with_data"))
        lines.append(
            f"| {method} ({len(mine)} seeds) | {spread} | {times} | {able:.0f} of {data:.0f} with data | {met:.0f} |"
        )
    return "\n".join(lines)


def _spread(mine: list[Row], end: int) -> str:
    """Return mean and deviation over seeds of the mean accuracy of the LAST rounds up to `end`."""
    found = [statistics.fmean(r["accuracy"][end - LAST : end]) for r in mine]
    return f"{statistics.fmean(found):.3f} ± {statistics.stdev(found) if len(found) > 1 else 0:.3f}"


def _time(mine: list[Row], target: float) -> str:
    reached = [s for r in mine if (s := reach(r, target)) is not None]
    if not reached:
        return "never"
    text = f"{statistics.median(reached):.1f} ({min(reached):.1f} to {max(reached):.1f})"
    return text if len(reached) == len(mine) else f"{text}, {len(reached)} of {len(mine)} seeds"


def reach(row: Row, target: float) -> float | None:
    """Return the simulated seconds at which a run first had the target accuracy."""
    return next((s for s, a in zip(row["seconds"], row["accuracy"], strict=True) if a >= target), None)


def draw(found: list[Row], path: Path) -> None:
    """Draw accuracy against simulated time: the mean of the seeds, and one standard deviation around it."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5))
    pairs = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    axes.set_prop_cycle(color=[*pairs[::2], *pairs[1::2]])
    for method in dict.fromkeys(r["method"] for r in found):
        mine = [r for r in found if r["method"] == method]
        grid = np.linspace(0, max(r["seconds"][-1] for r in mine), 120)
        curves = np.array([np.interp(grid, r["seconds"], r["accuracy"]) for r in mine])
        (line,) = axes.plot(grid, curves.mean(axis=0), label=method, linewidth=1.6)
        low, high = curves.mean(axis=0) - curves.std(axis=0), curves.mean(axis=0) + curves.std(axis=0)
        axes.fill_between(grid, low, high, color=line.get_color(), alpha=0.12)
    axes.set_xlabel("simulated seconds")
    axes.set_ylabel("accuracy on the test digits")
    axes.set_title("100 clients, budgets 0.2 to 1.1 of the unplanned peak, Dirichlet 0.1", loc="left")
    axes.legend(frameon=False, ncols=2)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    from graphplan.federated import METHODS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "methods",
        nargs="*",
        default=[*METHODS, *(f"{m}, {o}" for m in ("fedhybrid", "random_hybrid") for o in OPTIONS)],
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--write", type=Path, help="render what is stored into this page and run nothing")
    args = parser.parse_args()
    if args.write:
        found = sorted(rows(), key=lambda r: (list(METHODS).index(r["method"].split(",")[0]), r["method"], r["seed"]))
        draw(found, PLOT)
        write_between(args.write, "methods", table(found))
        return
    logging.getLogger("flwr").setLevel(logging.ERROR)
    profile()
    for seed in args.seeds:
        for method in args.methods:
            if (method, seed) not in {(r["method"], r["seed"]) for r in rows()}:  # others may run beside this one
                row = run(method, seed)
                with OUT.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    method, seed, f"{statistics.fmean(row['accuracy'][-LAST:]):.3f}", f"{row['wall']:.0f} s", flush=True
                )


if __name__ == "__main__":
    main()
