"""The executed lane: every method on one meter, paired steps in one process. `python -m bench.executed gpt --pairs 7`.

For each peer's setting: the measured peak (`graphplan.measure`), its step over plain PyTorch's, the seconds until it is
ready, its gradients' error against plain PyTorch's under the same seed (the largest difference over the largest
gradient; `rounding` is what a change of every weight in its last bit does to it); then ours at the
budget of that measured peak: measured and predicted peak, step over plain's and over the peer's in the same rounds,
predicted overhead. A budget of PyTorch's whose peak an earlier one has, to the byte, is the same program and is not
timed again. Each model runs in a process of its own; rows go to bench/results/executed.jsonl as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from bench.processes import RESULTS, run_again

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads
ROWS = RESULTS / "executed.jsonl"
METHODS = ("checkpoint", "ckptplan", "pytorch_budget", "inductor")
SWEPT = ("pytorch_budget", "inductor")


class Lane:
    """One model, its plain step, and ours at any budget."""

    def __init__(self, name: str, pairs: int, small: bool) -> None:
        import torch

        import graphplan
        from models_zoo import MODELS

        torch.manual_seed(0)
        entry = MODELS[name]
        self.name, self.pairs = name, pairs
        self.model = entry.build_small() if small else entry.build()
        self.example = entry.example_small() if small else entry.example()
        self.targets = self.example.targets
        self.loss_fn = entry.loss if self.targets is not None else (lambda outputs: entry.loss(outputs, None))
        start = time.perf_counter()
        self.planned = graphplan.optimize(
            self.model, "100%", self.example.inputs, loss_fn=self.loss_fn, example_targets=self.targets, time_limit=20
        )
        self.planning_s = time.perf_counter() - start

    def forward(self, module: Any) -> Any:
        """Return what the model returns."""
        return module(*self.example.inputs)

    def loss(self, module: Any) -> Any:
        """Return the loss of one forward pass."""
        outputs = self.forward(module)
        return self.loss_fn(outputs, self.targets) if self.targets is not None else self.loss_fn(outputs)

    def step(self, module: Any) -> None:
        """Run forward, loss and backward."""
        self.loss(module).backward()
        for p in self.model.parameters():
            p.grad = None

    def peak(self, module: Any) -> int:
        """Return the measured peak in bytes."""
        import graphplan

        found = graphplan.measure(module, self.example.inputs, self.loss_fn, example_targets=self.targets, runs=1)
        return found.peak_bytes

    def gradients(self, module: Any) -> list[Any]:
        """Return the gradients of a step from a fixed seed, buffers put back."""
        import torch

        buffers = [b.clone() for b in self.model.buffers()]
        torch.manual_seed(7)
        self.loss(module).backward()
        found = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        for p in self.model.parameters():
            p.grad = None
        for b, old in zip(self.model.buffers(), buffers, strict=True):
            b.data.copy_(old)
        return found

    def rounding(self, plain: list[Any]) -> float:
        """Return the plain model's own error after every weight was changed in its last bit."""
        import torch

        weights = [p.detach().clone() for p in self.model.parameters()]
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(1 + 2**-23)
        found = self.error(self.model, plain)
        with torch.no_grad():
            for p, old in zip(self.model.parameters(), weights, strict=True):
                p.copy_(old)
        return found

    def error(self, module: Any, plain: list[Any]) -> float:
        """Return the largest gradient difference over plain's largest gradient, each over all parameters."""
        pairs = [(a, b) for a, b in zip(self.gradients(module), plain, strict=True) if b is not None]
        scale = max(float(b.abs().max()) for _, b in pairs) or 1.0
        return max(float((a - b).abs().max()) if a is not None else scale for a, b in pairs) / scale


def run_model(name: str, args: argparse.Namespace) -> None:
    """Measure one model's lane, a row for each setting."""
    from bench.peers import BUDGETS, settings

    lane, end = Lane(name, args.pairs, args.small), time.monotonic() + 60 * args.minutes
    plain_peak, plain = lane.peak(lane.model), lane.gradients(lane.model)
    head = {"model": name, "small": args.small, "plain_peak": plain_peak, "ours_planning_s": lane.planning_s}
    head["rounding"] = lane.rounding(plain)
    head["minimum"] = lane.planned.plan.minimum_peak_bytes
    seen: dict[tuple[str, int], str] = {}
    for setting in settings(lane.model, lane.forward, set(args.methods), tuple(args.ratios or BUDGETS)):
        row = {**head, "method": setting.method, "setting": setting.name}
        if time.monotonic() > end:
            _write({**row, "failed": "not run: out of the time given to the model"})
            continue
        try:
            row.update(_peer(lane, setting, plain))
            module, first = row.pop("module"), seen.setdefault((setting.method, row["peak"]), setting.name)
            if setting.method in SWEPT and first != setting.name:
                row["same_as"] = first
            else:
                row.update(_ours(lane, module, row["peak"]))
        except Exception as e:  # noqa: BLE001  a peer may fail in any way; the row says how
            row.pop("module", None)
            row["failed"] = f"{type(e).__name__}: {str(e).splitlines()[0][:160] if str(e) else ''}"
        _write(row)


def _peer(lane: Lane, setting: Any, plain: list[Any]) -> dict[str, Any]:
    start = time.perf_counter()
    module = setting.build(lane.model)
    lane.step(module)
    ready = time.perf_counter() - start
    return {"ready_s": ready, "error": lane.error(module, plain), "peak": lane.peak(module), "module": module}


def _ours(lane: Lane, module: Any, peak: int) -> dict[str, Any]:
    """Time plain, peer and ours in the same rounds; ours at the peer's measured peak, if that is feasible."""
    from bench.pairs import Ratio, rounds
    from graphplan import InfeasibleBudget

    found: dict[str, Any] = {}
    calls = [lambda: lane.step(lane.model), lambda: lane.step(module)]
    try:
        ours = lane.planned.at_budget(max(peak, 1))
        ours.prepare(*lane.example.inputs)
        calls.append(lambda: lane.step(ours))
        plan = ours.plan
        found = {"ours_peak": lane.peak(ours), "predicted_peak": plan.peak_bytes, "predicted": 1 + plan.overhead}
        found.update(bound=plan.lower_bound_ns / plan.baseline_cost_ns, solver=plan.solver, gap=plan.gap)
    except InfeasibleBudget as e:
        found["ours_failed"] = f"needs {e.minimum_bytes} bytes"
    times = rounds(tuple(calls), lane.pairs)
    found["time"] = _quartiles(Ratio.of([t[1] / t[0] for t in times]))
    if len(calls) == 3:
        found["ours_time"] = _quartiles(Ratio.of([t[2] / t[0] for t in times]))
        found["ours_over_peer"] = _quartiles(Ratio.of([t[2] / t[1] for t in times]))
    return found


def _quartiles(ratio: Any) -> list[float]:
    return [ratio.low, ratio.median, ratio.high]


def _write(row: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    with ROWS.open("a") as out:
        out.write(json.dumps(row) + "\n")
    shown = {k: v for k, v in row.items() if k not in ("small", "plain_peak", "ours_planning_s", "minimum", "rounding")}
    print(json.dumps(shown), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=6.0, help="for each model")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--ratios", nargs="+", type=float, default=(), help="of PyTorch's budget; default: all 21")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--here", action="store_true", help="in this process")
    args = parser.parse_args()
    for name in args.names:
        if args.here:
            run_model(name, args)
            continue
        words = [name, "--here", "--pairs", args.pairs]
        words += ["--minutes", args.minutes, "--methods", *args.methods, *(["--small"] if args.small else [])]
        words += ["--ratios", *args.ratios] if args.ratios else []
        run_again("executed", *words)


if __name__ == "__main__":
    main()
