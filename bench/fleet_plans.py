"""A million clients' budgets answered from one frontier: `python -m bench.fleet_plans [--write docs/federated.md]`."""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads

import psutil

from bench.page import write_between

CLIENTS, RUNS = 1_000_000, 5
LEAST, MOST = 0.2, 1.1  # of the unplanned peak


def measure(model: str, size: str, batch: int) -> str:
    from graphplan.federated import RunConfig
    from graphplan.federated.frontier import MOST_POINTS
    from graphplan.federated.plans import Execution, Planner
    from graphplan.federated.task import task_of

    config = RunConfig(model=model, size=size, batch=batch, points=MOST_POINTS, time_limit=60.0)
    planner = Planner(task_of(config), Execution(), config)
    start = time.perf_counter()
    frontier = planner.frontier("")
    solving = time.perf_counter() - start
    unplanned = frontier.plans[-1].baseline_peak_bytes
    source = random.Random(0)
    budgets = [int(unplanned * source.uniform(LEAST, MOST)) for _ in range(CLIENTS)]
    process = psutil.Process()
    planner.packed("", budgets[0])
    rss = [process.memory_info().rss]
    rates = []
    for _ in range(RUNS):
        start = time.perf_counter()
        served = sum(1 for budget in budgets if planner.packed("", budget))
        rates.append(CLIENTS / (time.perf_counter() - start))
        rss.append(process.memory_info().rss)
    largest = max(len(t) for t in planner.texts.values())
    low, middle, high = min(rates), statistics.median(rates), max(rates)
    return (
        f"{model} ({size}, batch {batch}): {len(frontier.plans)} plans from at most {MOST_POINTS} solves in "
        f"{solving:.0f} s; {CLIENTS:,} budgets from {LEAST:.0%} to {MOST:.0%} of the unplanned peak, {served:,} of "
        f"them with a plan; {middle:,.0f} answers/s on one core (median of {RUNS}, {low:,.0f} to {high:,.0f}); an "
        f"answer is at most {largest:,} bytes; the server's memory grew by {(rss[-1] - rss[0]) / 2**20:.1f} MiB "
        f"over {RUNS * CLIENTS:,} answers"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    text = measure("models_zoo:resnet18", "small", 16)
    if args.write:
        write_between(args.write, "fleet plans", text)
    print(text)


if __name__ == "__main__":
    main()
