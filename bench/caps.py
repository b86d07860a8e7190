"""Clients under caps of the operating system: `python -m bench.caps [--write docs/federated.md]`.

Eight clients with budgets from 35 to 100 % of the unplanned peak, each a process of its own under RLIMIT_DATA = what
is mapped + its budget, train with the product's own local training: planned, and the same client unplanned.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads

import torch
from torch import nn

from bench.page import write_between
from bench.processes import RESULTS, ROOT

OUT = RESULTS / "caps.json"
CLIENTS, STEPS, LOWEST = 8, 4, 0.35
BATCH = {"resnet18": 64, "mobilenet_v2": 64}
MB = 1e6


def resnet18() -> tuple[nn.Module, tuple[torch.Tensor]]:
    import models_zoo

    return models_zoo.resnet18(num_classes=10, small_input=True), (torch.randn(BATCH["resnet18"], 3, 32, 32),)


def mobilenet_v2() -> tuple[nn.Module, tuple[torch.Tensor]]:
    import models_zoo

    return models_zoo.mobilenet_v2(num_classes=10), (torch.randn(BATCH["mobilenet_v2"], 3, 32, 32),)


def config(model: str) -> Any:
    from graphplan.federated import RunConfig

    place = f"bench.caps:{model}"
    return RunConfig(model=place, data="synthetic", batch=BATCH[model], points=24, time_limit=60.0, cap=True, step=True)


def worker(request: dict[str, Any]) -> dict[str, Any]:
    """One client in a process of its own."""
    from graphplan.federated.execution import Order, Refused, Trainer, train
    from graphplan.federated.plans import unpack
    from graphplan.federated.task import batches, task_of

    asked = config(request["model"])
    task = task_of(asked)
    trainer = Trainer(task)
    plans = unpack(Path(request["plans"]).read_bytes()) if request["plans"] else ()
    if plans:
        trainer.program(plans[0])
    work = tuple(batches(task.train, asked.batch, 1, "0"))[:STEPS]
    order = Order(plans, request["unplanned"], asked.learning_rate, capped=True)
    try:
        outcome = train(trainer, work, order, lambda: int(request["budget"]))
    except Refused as e:
        return {"refused": str(e)}
    return {
        "steps": outcome.steps,
        "planned": outcome.planned_peak_bytes,
        "measured": outcome.measured_peak_bytes,
        "rss": outcome.rss_growth_bytes,
        "step_ns": outcome.step_ns,
    }


def in_process(request: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.caps", "--worker", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        return {"killed": done.returncode, "said": done.stderr[-400:]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def clients(model: str) -> dict[str, Any]:
    from graphplan.federated.plans import Execution, Planner, pack
    from graphplan.federated.task import task_of

    asked = config(model)
    planner = Planner(task_of(asked), Execution().under(asked), asked)
    frontier = planner.frontier("")
    plain = Planner(task_of(asked), Execution(planned=False), asked)
    unplanned = plain.frontier("").plans[-1].baseline_peak_bytes
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plans = Path(folder, "plans")
        for i in range(CLIENTS):
            budget = int(unplanned * (LOWEST + (1 - LOWEST) * i / (CLIENTS - 1)))
            row: dict[str, Any] = {"budget": budget, "fits": frontier.index(budget) >= 0}
            request = {"model": model, "budget": budget, "unplanned": unplanned, "plans": ""}
            row["unplanned"] = in_process(request)
            if row["fits"]:
                plans.write_bytes(pack([frontier.at(budget).to_json()]))
                row["planned"] = in_process({**request, "plans": str(plans)})
            rows.append(row)
            print(model, f"{budget / unplanned:.0%}", row, flush=True)
    return {"model": model, "unplanned": unplanned, "least": frontier.peaks[0], "rows": rows}


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model, synthetic CIFAR-shaped batches of 64 | budget, MB | of the unplanned peak | planned peak, MB "
        "| measured peak, MB | RSS growth, MB | planned under the cap | unplanned under the cap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["rows"]:
            budget, share = row["budget"], row["budget"] / result["unplanned"]
            done = row.get("planned")
            if done is None:
                figures = f"| | | | nothing fits: at least {result['least'] / MB:.1f} MB "
            elif "steps" in done:
                peaks = " | ".join(f"{done[k] / MB:.1f}" for k in ("planned", "measured", "rss"))
                figures = f"| {peaks} | finished "
            else:
                figures = f"| | | | {_said(done)} "
            lines.append(
                f"| {result['model']} | {budget / MB:.1f} | {share:.0%} {figures}| {_said(row['unplanned'])} |"
            )
    return "\n".join(lines)


def _said(done: dict[str, Any]) -> str:
    if "steps" in done:
        return "finished"
    return "refused by the operating system" if "refused" in done else f"killed ({done['killed']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(BATCH))
    parser.add_argument("--worker")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(json.loads(args.worker))))
        return
    results = [clients(m) for m in args.models]
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n")
    if args.write:
        write_between(args.write, "caps", table(results))
    else:
        print(table(results))


if __name__ == "__main__":
    main()
