"""Whole steps: `train_step` with SGD beside `optimize` and PyTorch's means, on one meter.

`python -m bench.step --write docs/step.md`

For each zoo model at its real size: the least peak of a whole step; of `optimize` with the update after it; of plain
PyTorch; of the optimizer in the backward (a hook on every parameter that applies and drops its gradient), alone, with
checkpointed blocks and with PyTorch's memory budget. All peaks are measured. Last the GPT with 50,257 tokens
(`vocabulary`), with and without chunks. `--time` measures only the step at 100 % against the plain loop, in turn, on
a machine that does nothing else (`--time resnet18 gpt --seconds 30`), with threads that wait as users' do; `--apart`
with each of the two in a process of its own. Each model runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.processes import RESULTS, rows_of, run_again, save_row

RATIOS = (0.1, 0.0)  # of PyTorch's memory budget
LEARNING_RATE = 0.01
SOLVING = 10.0  # seconds, at the least peak
STORED = "stored"
TIMES = {"apart": "apart", "time": "in one process", "kept": "in one process, memory kept"}
VOCABULARY, TIME, BATCH = 50_257, 256, 4


def peer(model: Any, forward: Callable[..., Any], entry: Any, hooks: bool) -> Any:
    """Return PyTorch's own training step as graphplan.measure takes it; with `hooks`, the optimizer in the backward."""
    import torch

    from graphplan.whole import WholeStep

    class Peer(WholeStep):
        def __init__(self) -> None:
            self.model, self.optimizer = model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

        def __call__(self, inputs: Any, targets: Any = None) -> Any:
            loss = entry.loss(forward(*inputs), targets)
            loss.backward()
            if not hooks:
                self.optimizer.step()
                self.optimizer.zero_grad()
            return loss.detach()

    return Peer()


@contextmanager
def optimizer_in_backward(model: Any) -> Iterator[None]:
    """Apply and drop every gradient as soon as autograd has accumulated it."""
    import torch

    own = {p: torch.optim.SGD([p], lr=LEARNING_RATE) for p in model.parameters()}

    def apply(p: Any) -> None:
        own[p].step()
        own[p].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(apply) for p in own]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_peers(model: Any, entry: Any, example: Any, methods: set[str]) -> dict[str, int | str]:
    """Return the measured peak of each peer, or why there is none."""
    import torch

    import graphplan
    from bench.peers import settings

    def run(module: Any) -> None:
        entry.loss(module(*example.inputs), example.targets)

    def peak(forward: Any, hooks: bool) -> int | str:
        try:
            step = peer(model, forward, entry, hooks)
            return graphplan.measure(step, example.inputs, example_targets=example.targets, runs=1).peak_bytes
        except Exception as e:  # noqa: BLE001  (a peer that fails is a row that says so)
            return f"{type(e).__name__}: {str(e).splitlines()[0][:80]}"

    found = {"plain": peak(model, False)}
    with optimizer_in_backward(model):
        found["hooks"] = peak(model, True)
        for setting in list(settings(model, run, methods, RATIOS)):
            if setting.method == "checkpoint" and setting.name not in ("every block", half_of(model)):
                continue  # of the least peak the others are never the best
            found[f"{setting.method} {setting.name} + hooks"] = peak(setting.build(model), True)
            torch._dynamo.reset()
    return found


def half_of(model: Any) -> str:
    """Return the name of the setting that checkpoints half of the blocks."""
    from bench.peers import blocks

    count = len(blocks(model))
    return f"{count // 2} of {count} blocks"


def measure_model(name: str, time_limit: float, methods: set[str]) -> dict[str, Any]:
    """Return one row of the table."""
    import torch

    import graphplan
    from models_zoo import MODELS

    torch.manual_seed(0)
    entry = MODELS[name]
    model, example = entry.build(), entry.example()
    inputs, targets = example.inputs, example.targets

    def measured(step: Any, loss_fn: Any = None) -> int:
        return graphplan.measure(step, inputs, loss_fn, example_targets=targets, runs=1).peak_bytes

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    start = time.perf_counter()
    full = graphplan.train_step(model, entry.loss, optimizer, "100%", inputs, targets, time_limit=time_limit)
    seconds = time.perf_counter() - start
    least = at_least(full)
    least.prepare(inputs, targets)
    exact, *rest = full.least_peaks(inputs, targets)
    loss_fn = entry.loss if targets is not None else (lambda outputs: entry.loss(outputs, None))
    halves = graphplan.optimize(model, "100%", inputs, loss_fn=loss_fn, example_targets=targets, time_limit=time_limit)
    halves = at_least(halves)
    halves.prepare(*inputs)
    return {
        "name": name,
        "parameters": sum(p.numel() * p.element_size() for p in model.parameters()),
        "exact": exact,
        "least": measured(least),
        "predicted": least.plan.peak_bytes,
        "overhead": least.plan.overhead,
        "forms": 1 + len(rest),
        "optimize": measured(halves, loss_fn),
        "planning_s": seconds,
        "peers": stored_peers(name) if methods == {STORED} else measure_peers(model, entry, example, methods),
    }


def at_least(planned: Any) -> Any:
    """Return the same at its least peak; the search has found a plan for it, to be improved no longer than SOLVING."""
    new = planned.at_budget(planned.plan.minimum_peak_bytes)
    new._planner.options = replace(new._planner.options, time_limit=SOLVING)
    return new


def stored_peers(name: str) -> dict[str, int | str]:
    """Return what was measured of the peers before: it depends on torch and the threads alone."""
    peers: dict[str, int | str] = json.loads((RESULTS / f"step_{name}.json").read_text())["peers"]
    return peers


@dataclass(frozen=True, slots=True)
class Loops:
    """A zoo model at its real size, and its loops over one batch."""

    entry: Any
    model: Any
    inputs: Any
    targets: Any

    @staticmethod
    def of(name: str) -> Loops:
        import torch

        from models_zoo import MODELS

        torch.manual_seed(0)
        entry = MODELS[name]
        example = entry.example()
        return Loops(entry, entry.build(), example.inputs, example.targets)

    def plain(self) -> Callable[[], object]:
        """Return a step of the plain loop."""
        step = peer(self.model, self.model, self.entry, False)
        return lambda: step(self.inputs, self.targets)

    def planned(self) -> Callable[[], object]:
        """Return a planned step at 100 %."""
        import torch

        import graphplan

        optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
        step = graphplan.train_step(
            self.model, self.entry.loss, optimizer, "100%", self.inputs, self.targets, time_limit=2.0
        )
        return lambda: step(self.inputs, self.targets)


def measure_time(name: str, seconds: float) -> dict[str, Any]:
    """Return the time of a step at 100 % over the plain loop's in the same process, and of that loop over itself."""
    from bench.pairs import over_twice

    loops = Loops.of(name)
    return {"name": name, **over_twice(loops.planned(), loops.plain(), seconds)}


def measure_vocabulary(time_limit: float) -> dict[str, Any]:
    """Return the least and the unplanned peaks of a GPT with 50,257 tokens, with and without chunks."""
    import torch

    import graphplan
    from models_zoo import MODELS
    from models_zoo.gpt import GPT

    torch.manual_seed(0)
    model = GPT(vocab=VOCABULARY, context=TIME)
    ids = torch.randint(VOCABULARY, (BATCH, TIME + 1))
    inputs = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss = MODELS["gpt"].loss
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    step = graphplan.train_step(model, loss, optimizer, "100%", inputs, time_limit=time_limit)
    whole, chunked = step.least_peaks(inputs)
    least = step.at_budget(chunked)
    least.prepare(inputs)
    return {
        "parameters": sum(p.numel() * p.element_size() for p in model.parameters()),
        "whole": whole,
        "chunked": chunked,
        "measured": graphplan.measure(least, inputs, runs=1).peak_bytes,
        "plain": graphplan.measure(peer(model, model, MODELS["gpt"], False), inputs, runs=1).peak_bytes,
    }


def best_peer(row: dict[str, Any]) -> tuple[str, int]:
    """Return the peer with the lowest peak."""
    peaks = {k: v for k, v in row["peers"].items() if isinstance(v, int)}
    name = min(peaks, key=lambda k: peaks[k])
    return name, peaks[name]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, their geometric means last."""
    columns = (
        "model", "parameters, MB", "plain loop, MB", "optimize, least, MB", "train_step, least, to the bit, MB",
        "train_step, least, MB", "/ optimize", "best peer, MB", "/ best peer",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in rows:
        name, peak = best_peer(r)
        cells = [
            r["name"], mb(r["parameters"]), mb(r["peers"]["plain"]), mb(r["optimize"]), mb(r["exact"]), mb(r["least"]),
            f"{r['least'] / r['optimize']:.2f}", f"{mb(peak)} ({name})", f"{r['least'] / peak:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    ours, exact, peers = (
        geometric([r["least"] / r["optimize"] for r in rows]),
        geometric([r["exact"] / r["optimize"] for r in rows]),
        geometric([r["least"] / best_peer(r)[1] for r in rows]),
    )
    off = max(abs(r["predicted"] / r["least"] - 1) for r in rows)
    lines.append("")
    lines.append(
        f"Geometric means over {len(rows)} models: least peak / optimize's {ours:.3f} (to the bit {exact:.3f}), / the "
        f"best peer's {peers:.3f}. Largest error of a predicted least peak: {off:.2%}."
    )
    return "\n".join(lines)


def time_table(ways: dict[str, list[dict[str, Any]]]) -> str:
    """Return the step times at 100 % as Markdown, measured in each of the ways of TIMES."""
    columns = ("planned / plain loop", "plain loop / itself", "rounds")
    titles = ("model", *(f"{TIMES[way]}: {c}" for way in ways for c in columns))
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    found = {way: {r["name"]: r for r in rows} for way, rows in ways.items()}
    for name in dict.fromkeys(name for rows in found.values() for name in rows):
        cells = [c for rows in found.values() for c in (_times(rows[name]) if name in rows else ("", "", ""))]
        lines.append("| " + " | ".join((name, *cells)) + " |")
    means = [f"{TIMES[way]} {geometric([r['ratio']['median'] for r in rows]):.3f}" for way, rows in ways.items()]
    lines.append(f"\nGeometric mean of planned / plain loop: {', '.join(means)}.")
    return "\n".join(lines)


def _times(row: dict[str, Any]) -> tuple[str, str, str]:
    ratio, null = (f"{x['median']:.2f} ({x['low']:.2f} to {x['high']:.2f})" for x in (row["ratio"], row["null"]))
    return ratio, null, str(row["ratio"]["pairs"])


def vocabulary_text(row: dict[str, Any]) -> str:
    """Return the GPT's figures as a line."""
    return (
        f"GPT, {VOCABULARY:,} tokens, T {TIME}, batch {BATCH}, {mb(row['parameters'])} MB of parameters: plain loop "
        f"{mb(row['plain'])} MB; least peak with the loss whole {mb(row['whole'])} MB, in chunks "
        f"{mb(row['chunked'])} MB (measured {mb(row['measured'])}): {row['chunked'] / row['whole']:.3f}."
    )


def mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f}"


def geometric(ratios: list[float]) -> float:
    return math.exp(sum(math.log(r) for r in ratios) / len(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="zoo models, or vocabulary (default: all)")
    parser.add_argument("--time", action="store_true", help="step times, not peaks")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--apart", action="store_true", help="with --time: each loop in a process of its own")
    way.add_argument("--kept", action="store_true", help="with --time: malloc keeps what is freed")
    parser.add_argument("--seconds", type=float, default=30.0, help="of steps for each model, with --time")
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds of solving")
    parser.add_argument("--minutes", type=float, default=20.0, help="for one model")
    peers = ("checkpoint", "pytorch_budget")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=(*peers, STORED),
        default=peers,
        help="beside the hooks alone; stored: none is measured, those of the last run stay",
    )
    parser.add_argument("--write", type=Path, help="Markdown file whose blocks are replaced")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        save_row(*measure_one(args))
    else:
        run_all(args)


def measure_one(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return the name of one model's row, and the row."""
    from bench.turns import measure_apart

    name = args.one
    if args.apart:
        return f"step_apart_{name}", measure_apart(name, args.seconds)
    if args.time:
        return f"step_{'kept' if args.kept else 'time'}_{name}", measure_time(name, args.seconds)
    if name == "vocabulary":
        return "step_vocabulary", measure_vocabulary(args.time_limit)
    return f"step_{name}", measure_model(name, args.time_limit, set(args.peers))


def run_all(args: argparse.Namespace) -> None:
    """Measure every model in a process of its own, then print and write what is known."""
    from bench.page import write_between
    from models_zoo import MODELS

    given = ["--seconds", args.seconds, "--time-limit", args.time_limit, "--peers", *args.peers]
    given += [f"--{way}" for way in ("time", "kept", "apart") if getattr(args, way)]
    for name in args.names or [*MODELS, *([] if args.time else ["vocabulary"])]:
        run_again("step", "--one", name, *given, minutes=args.minutes, spin=args.time, kept=args.kept)
    rows, times = rows_of("step_", MODELS), {way: rows_of(f"step_{way}_", MODELS) for way in TIMES}
    times = {way: found for way, found in times.items() if found}
    blocks = {
        "step table": table(rows) if rows else "",
        "step time": time_table(times) if times else "",
        "step vocabulary": "\n".join(vocabulary_text(r) for r in rows_of("step_", ["vocabulary"])),
    }
    for block, text in blocks.items():
        print(text)
        if args.write and text:
            write_between(args.write, block, text)


if __name__ == "__main__":
    main()
