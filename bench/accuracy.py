"""Does training with lossy codes reach the same accuracy? `python -m bench.accuracy --write docs/codecs.md`.

ResNet-18 (small) on scikit-learn's digits, and a GPT (small) on characters of the standard library's own
documentation. "exact": the planned step without lossy codes. "noise 0.1": the plan that holds the fewest bytes between
forward and backward without recomputing, within that cap, estimated on the first batch. "uniform 4 bit, exact masks":
every activation that can be has four bits. "uniform 4 bit, no masks": autograd's saved tensors in the same four bits, a
ReLU's among them, which then also decide which gradients pass: the warning. Every method starts from the same weights
and sees the same batches.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pydoc_data.topics
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphplan
from bench.ground import Ground, joint_noise, plan_of, prepared_ground, turn_only
from bench.hybrid import all_encoded
from bench.page import between, write_between
from bench.processes import RESULTS, run_again, save_row
from graphplan import functions
from graphplan.codecs.lossy import LEAST_BYTES
from models_zoo import MODELS
from models_zoo.entry import Example

CAPS = (0.01, 0.1, 1.0)
RENEWED = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8)  # of the steps
METHODS = ("exact", *(f"noise {c:g}" for c in CAPS), "uniform 4 bit, exact masks", "uniform 4 bit, no masks")


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained: `batches(seed)` of training, `score(model)` on data that training never sees."""

    model: str
    steps: int
    rate: float
    batches: Callable[[int], Iterator[Example]]
    score: Callable[[nn.Module], float]
    loss_fn: Callable[..., Tensor]
    unit: str
    adam: bool = False  # else SGD


def digits(batch: int = 64, epochs: int = 12) -> Task:
    """Return ResNet-18 (small) on the digits: three quarters to train on, one to be scored on."""
    data = importlib.import_module("sklearn.datasets").load_digits()
    images = F.interpolate(torch.from_numpy(data.images).float()[:, None] / 16 - 0.3, size=(32, 32), mode="bilinear")
    images, labels = images.repeat(1, 3, 1, 1), torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(order) // 4], order[len(order) // 4 :]

    def batches(seed: int) -> Iterator[Example]:
        random = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            shuffled = kept[torch.randperm(len(kept), generator=random)]
            for i in range(0, len(kept) - batch + 1, batch):
                chosen = shuffled[i : i + batch]
                yield Example((images[chosen],), labels[chosen])

    def score(model: nn.Module) -> float:
        return 100 * float((model(images[held]).argmax(1) == labels[held]).float().mean())

    steps = epochs * (len(kept) // batch)
    return Task("resnet18", steps, 0.05, batches, score, MODELS["resnet18"].loss, "accuracy, %")


def characters(batch: int = 32, steps: int = 600) -> Task:
    """Return GPT (small) on the text of Python's help topics: the last tenth is scored on, in bits a character."""
    text = "".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics))
    codes = torch.tensor([min(ord(c), 127) for c in text], dtype=torch.int64)
    train, held, time = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :], 32

    def window(source: Tensor, starts: Tensor) -> Example:
        at = starts[:, None] + torch.arange(time)
        return Example((source[at], source[at + 1]), None)

    def batches(seed: int) -> Iterator[Example]:
        random = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            yield window(train, torch.randint(len(train) - time - 1, (batch,), generator=random))

    def score(model: nn.Module) -> float:
        starts = torch.arange(0, len(held) - time - 1, time)[:1024]
        return float(model(*window(held, starts).inputs)) / torch.log(torch.tensor(2.0)).item()

    return Task("gpt", steps, 3e-3, batches, score, lambda loss: loss, "bits a character", adam=True)


TASKS = {"digits": digits, "characters": characters}


def train(task: Task, method: str, seed: int) -> dict[str, Any]:
    """Train once; return the score, and the noise of the codes on the first batch and on the last."""
    torch.manual_seed(seed)
    model = MODELS[task.model].build_small()
    first = next(task.batches(seed))
    module, here, schedule = _planned(task, model, first, method)
    found: dict[str, Any] = {"task": task.model, "method": method, "seed": seed}
    if here is not None:
        found.update(_figures(here, schedule))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=task.rate) if task.adam else _sgd(model, task.rate)
    schedule_of_rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, total_steps=task.steps)
    torch.manual_seed(seed)
    model.train()
    renewed = {int(part * task.steps) for part in RENEWED} if method.startswith("noise") else set()
    for i, example in enumerate(task.batches(seed)):
        if i in renewed:
            module, here, schedule = _planned(task, model, example, method)
        _loss(task, module, example, masked=method != METHODS[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule_of_rate.step()
    if here is not None:
        found["noise_last"] = joint_noise(here, schedule).noise
    model.eval()
    with torch.no_grad():
        found["score"] = task.score(model)
    return found


def _sgd(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)


def _loss(task: Task, module: Any, example: Example, *, masked: bool) -> Tensor:
    def run() -> Tensor:
        outputs = module(*example.inputs)
        return task.loss_fn(outputs) if example.targets is None else task.loss_fn(outputs, example.targets)

    if masked:
        return run()
    with torch.autograd.graph.saved_tensors_hooks(*_hooks(module)):
        return run()


def _hooks(model: nn.Module) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Return what packs every saved activation in four bits and unpacks it, whoever reads it and for what."""
    weights, count = {p.data_ptr() for p in model.parameters()}, iter(range(1 << 62))

    def pack(x: Tensor) -> Any:
        few = x.numel() * x.element_size() < LEAST_BYTES
        if not x.is_floating_point() or few or x.data_ptr() in weights or not functions.is_dense(x):
            return x
        return functions.quantise(x, 4, next(count), 0), x.shape, x.stride(), x.dtype

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        code, *like = kept
        back: Tensor = functions.dequantise(code, 4, *like)
        return back

    return pack, unpack


def _planned(task: Task, model: nn.Module, first: Example, method: str) -> tuple[Any, Ground | None, Any]:
    """Return what is called in place of the model, its Ground, and the schedule of its plan."""
    import solvers
    from graphplan.lower import computing_once

    if method == METHODS[-1]:
        return model, None, None
    cap = float(method.removeprefix("noise ")) if method.startswith("noise") else 0.1
    noise = graphplan.estimate_noise(
        model, first.inputs, loss_fn=task.loss_fn, example_targets=first.targets, weights="adam" if task.adam else "sgd"
    )
    here = prepared_ground(model, first, task.loss_fn, None, time_limit=5, gradient_noise=cap, noise=noise)
    problem = here.prepared.problem
    schedule = problem.program
    if method.startswith("uniform"):  # refused ones, too
        here = replace(here, prepared=replace(here.prepared, problem=_any_noise(problem)))
        schedule = tuple(all_encoded(here, "int4")[0])
    elif method.startswith("noise"):
        whole = problem.noise_limit_ppb
        for limit in (whole, whole // 2, whole // 4, 0):  # as a plan's own check does
            capped = replace(problem, noise_limit_ppb=limit)
            least = solvers.least_peak(computing_once(turn_only(capped)), solvers.Limits(seconds=4))
            assert least.schedule is not None
            schedule = least.schedule
            if limit == 0 or joint_noise(here, schedule).noise <= cap:
                break
    plan = plan_of(here, schedule)
    return graphplan.apply(model, plan, first.inputs, **here.loss), here, schedule


def _figures(here: Ground, schedule: Any) -> dict[str, Any]:
    from bench.ground import held_at_turn
    from solvers import simulate

    problem = here.prepared.problem
    program = held_at_turn(problem, problem.program)
    usage = simulate(_any_noise(problem), schedule)
    return {
        "held": held_at_turn(problem, schedule) / program,
        "noise": usage.noise_ppb / 1e9,
        "noise_first": joint_noise(here, schedule).noise,
    }


def _any_noise(problem: Any) -> Any:
    return replace(problem, noise_limit_ppb=1 << 62)


def table(rows: list[dict[str, Any]], before: str = "") -> str:
    """Return mean and deviation over the seeds, as Markdown; of what has no rows here the line of the table `before`.

    Where the rows of "exact" are not here either, its mean and deviation are read there.
    """
    stood = {tuple(line.split(" | ")[:2]): line for line in before.splitlines() if " | " in line}
    lines = ["| task | method | held across the turn | noise predicted | measured, first batch | measured, trained |"]
    lines[0] += " score, mean and deviation | seeds | |"
    lines.append("|" + "---|" * 9)
    for name, make in TASKS.items():
        task = make()
        own = [r for r in rows if r["task"] == task.model]
        exact = _spread(own, stood.get((f"| {name} ({task.unit})", METHODS[0]), ""))
        for method in METHODS:
            found = [r for r in own if r["method"] == method]
            if not found:
                lines += [line] if (line := stood.get((f"| {name} ({task.unit})", method))) else []
                continue
            scores = [r["score"] for r in found]
            mean, verdict, score = statistics.mean(scores), "", f"{scores[0]:.3f}"
            if len(scores) > 1 and exact is not None:  # one seed says nothing of the spread
                score = f"{mean:.3f} ± {statistics.stdev(scores):.3f}"
                within = abs(mean - exact[0]) <= exact[1]
                verdict = "within one deviation of exact" if within else "outside"
            cells = [f"{name} ({task.unit})", method, *(_mean(found, k) for k in ("held", "noise"))]
            cells += [*(_mean(found, k) for k in ("noise_first", "noise_last")), score, str(len(found)), verdict]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(rows: list[dict[str, Any]], line: str) -> tuple[float, float] | None:
    """Return mean and deviation of "exact", from its rows or from its line; None where neither has any."""
    exact = [r["score"] for r in rows if r["method"] == METHODS[0]]
    if len(exact) > 1:
        return statistics.mean(exact), statistics.stdev(exact)
    found = re.search(r"([\d.]+) ± ([\d.]+)", line)
    return (float(found[1]), float(found[2])) if found else None


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    found = [r[key] for r in rows if key in r]
    return f"{statistics.mean(found):.3f}" if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="Markdown file whose table is replaced")
    parser.add_argument("--one", nargs=3, metavar=("TASK", "METHOD", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, method, seed = args.one
        row = train(TASKS[name](), method, int(seed))
        save_row(f"accuracy_{name}_{METHODS.index(method)}_{seed}", row)
        print(json.dumps(row), flush=True)
        return
    for seed in range(args.seeds):
        for name in args.tasks:
            for method in args.methods:
                if (RESULTS / f"accuracy_{name}_{METHODS.index(method)}_{seed}.json").exists():
                    continue  # a run that was broken off goes on
                run_again("accuracy", "--one", name, method, seed)
    before = between(args.write, "accuracy") if args.write else ""
    text = table([json.loads(p.read_text()) for p in sorted(RESULTS.glob("accuracy_*.json"))], before)
    print(text)
    if args.write:
        write_between(args.write, "accuracy", text)


if __name__ == "__main__":
    main()
