"""One process of `graphplan demo`: plans, or trains a few dozen steps, its data segment capped if asked.

It is started by `graphplan.cli.demo` with a request (JSON) as its one argument and writes one JSON object a
line on standard output: `{"event": "progress", ...}` while it works, one `{"event": "result", ...}` at the end.
"""

from __future__ import annotations

import copy
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphplan.cap import Cap, start_threads
from graphplan.choices import plan_model
from graphplan.device import Device
from graphplan.errors import GraphplanError, InfeasibleBudget
from graphplan.functions import start_loops
from graphplan.measure import measure, resident_bytes
from graphplan.optimize import Source, make_options
from graphplan.plan import Plan
from graphplan.planned import PlannedModule

SEED = 0
PAIR_EVERY = 6  # steps; the step times of both are compared next to each other
SIDE = 32  # pixels, from the digits' own 8
LEARNING_RATE = 0.02


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker is asked: `mode` is "plan", "eager" or "planned"; `allowance_bytes` 0 sets no cap."""

    mode: str
    batch: int
    steps: int
    budget: str
    time_limit: float
    out: str
    allowance_bytes: int = 0
    measured: bool = True


class Digits:
    """scikit-learn's 1,797 handwritten digits as batches [batch, 3, 32, 32], in one fixed random order."""

    def __init__(self, batch: int) -> None:
        """Read the images that the library bundles."""
        data = importlib.import_module("sklearn.datasets").load_digits()
        self.images = torch.from_numpy(data.images).float() / 16
        self.labels = torch.from_numpy(data.target).long()
        self.order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(SEED))
        self.batch = batch

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return images and labels of one training step; the order repeats after an epoch."""
        start = step * self.batch
        chosen = self.order[torch.arange(start, start + self.batch) % len(self.order)]
        small = self.images[chosen][:, None] - 0.3
        large = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        images = large.repeat(1, 3, 1, 1).to(memory_format=torch.channels_last)
        return images, self.labels[chosen]


def build() -> nn.Module:
    """Return ResNet-18 for 32x32 images and ten classes, the same weights in every process."""
    torch.manual_seed(SEED)
    model: nn.Module = importlib.import_module("models_zoo").resnet18(num_classes=10, small_input=True)
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return model


def plan(request: Request) -> dict[str, Any]:
    """Plan one training step; save the plan and this machine's profile in the output folder."""
    model = build()
    images, labels = Digits(request.batch)[0]
    options = make_options(
        request.budget,
        loss_fn=F.cross_entropy,
        example_targets=labels,
        time_limit=request.time_limit,
        report=_progress,
    )
    prepared, made = plan_model(model, Source.of(model, (images,), {}, options), options)
    made.save(Path(request.out, "plan.json"))
    prepared.device.save(Path(request.out, "device.json"))
    return {}


def train(request: Request) -> dict[str, Any]:
    """Train under the cap that is asked for; then, the cap lifted, measure one more step."""
    model, digits = build(), Digits(request.batch)
    module = model if request.mode == "eager" else _planned(model, request, digits)
    rival = _rival(model, request, digits) if request.mode == "eager" and request.measured else None
    resident = resident_bytes(model, *digits[0])
    start_threads()
    if module is not model:
        start_loops(lossy=False)  # what codecs load and compile is no tensor memory, either
    losses: list[float] = []
    times: list[int] = []
    pairs: list[tuple[int, int]] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    with Cap(request.allowance_bytes - resident if request.allowance_bytes else None) as cap:
        for index in range(request.steps):
            _progress("training", index, request.steps)
            loss, ns = _train_step(module, optimizer, digits[index])
            losses.append(loss)
            times.append(ns)
            if rival is not None and index % PAIR_EVERY == 1:
                pairs.append((ns, rival(digits[index])))
    result: dict[str, Any] = {"losses": losses, "step_ns": int(statistics.median(times[1:] or times or [0]))}
    result.update(refusal=cap.refusal, cap_bytes=cap.cap_bytes, before_bytes=cap.before_bytes, pairs=pairs)
    if request.measured and cap.refusal is None:
        images, labels = digits[request.steps]
        m = measure(module, (images,), F.cross_entropy, example_targets=labels, runs=1)
        result.update(peak_bytes=m.peak_bytes, resident_bytes=m.resident_bytes, timeline=m.timeline)
    return result


def _rival(model: nn.Module, request: Request, digits: Digits) -> Callable[[tuple[Tensor, Tensor]], int]:
    """Return what times one planned step on a copy of the model, beside an unplanned one."""
    planned = _planned(copy.deepcopy(model), request, digits)
    optimizer = torch.optim.SGD(planned.parameters(), lr=LEARNING_RATE)
    _train_step(planned, optimizer, digits[0])

    def timed(batch: tuple[Tensor, Tensor]) -> int:
        return _train_step(planned, optimizer, batch)[1]

    return timed


def _train_step(module: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> tuple[float, int]:
    """Return the loss of one training step, and its ns."""
    start = time.perf_counter_ns()
    images, labels = batch
    loss = F.cross_entropy(module(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), time.perf_counter_ns() - start


def _planned(model: nn.Module, request: Request, digits: Digits) -> nn.Module:
    """Return the model executing the saved plan; the saved profile spares running every op once more."""
    images, labels = digits[0]
    made = Plan.load(Path(request.out, "plan.json"))
    device = Device.load(Path(request.out, "device.json"))
    options = make_options(
        made.budget_bytes,
        made.codecs or "none",
        device=device,
        loss_fn=F.cross_entropy,
        example_targets=labels,
    )
    planned = PlannedModule(model, options)
    planned.adopt(made, images)
    return planned


def _progress(stage: str, done: int, total: int) -> None:
    _emit({"event": "progress", "stage": stage, "done": done, "total": total})


def _emit(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def read_events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the messages among the lines that a worker wrote."""
    for line in lines:
        if line.startswith('{"event"'):
            yield json.loads(line)


def request_text(request: Request) -> str:
    """Return the argument that starts a worker with this request."""
    return json.dumps(asdict(request))


def main() -> None:
    """Do what the request asks and report the result; an error on purpose is reported as one line."""
    request = Request(**json.loads(sys.argv[1]))
    try:
        result = plan(request) if request.mode == "plan" else train(request)
    except GraphplanError as e:
        result = {"error": str(e), "kind": type(e).__name__}
        if isinstance(e, InfeasibleBudget):
            result.update(minimum_bytes=e.minimum_bytes, binding_op=e.binding_op)
    _emit({"event": "result", **result})


if __name__ == "__main__":
    main()
