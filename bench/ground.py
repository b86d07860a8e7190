"""What the lanes about codecs share: a zoo model captured, profiled, its noise estimated once, and its sub-problems."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.processes import ROOT

if TYPE_CHECKING:
    from graphplan.capture import Capture
    from graphplan.device import Device
    from graphplan.instructions import Instructions
    from graphplan.lift import Prepared
    from graphplan.noise import Noise
    from graphplan.optimize import Options
    from graphplan.plan import Plan
    from graphplan.replay import Batch
    from solvers import Problem, Schedule

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads
FAR = 1 << 44  # bytes: nothing else binds


@dataclass(frozen=True, slots=True)
class Ground:
    """One model, its batch and its Problem with every codec; `device` knows what its ops cost."""

    model: Any
    example: Any
    loss_fn: Any
    captured: Capture
    device: Device
    options: Options
    prepared: Prepared
    batch: Batch

    @property
    def loss(self) -> dict[str, Any]:
        """The keyword arguments that name the loss."""
        return {"loss_fn": self.loss_fn, "example_targets": self.example.targets}


def ground(name: str, *, small: bool = False, time_limit: float = 20.0, gradient_noise: float = 0.1) -> Ground:
    """Capture and profile a zoo model; its noise is read from bench/out, or estimated and left there."""
    import torch

    from models_zoo import MODELS

    torch.manual_seed(0)
    entry = MODELS[name]
    model = entry.build_small() if small else entry.build()
    example = entry.example_small() if small else entry.example()
    loss_fn = entry.loss if example.targets is not None else (lambda outputs: entry.loss(outputs, None))
    path = ROOT / "bench" / "out" / f"noise_{name}{'_small' if small else ''}.json"
    return prepared_ground(model, example, loss_fn, path, time_limit=time_limit, gradient_noise=gradient_noise)


def prepared_ground(
    model: Any, example: Any, loss_fn: Any, path: Path | None, *, time_limit: float = 20.0, gradient_noise: float = 0.1,
    noise: Noise | None = None,
) -> Ground:  # fmt: skip
    """Return the Ground of a model on a batch with this `noise`, else what is in the file `path`, or will be."""
    from graphplan.capture import capture, flatten_call
    from graphplan.device import Device
    from graphplan.noise import Noise
    from graphplan.optimize import make_options, prepare
    from graphplan.replay import Batch

    known = Noise.load(path) if noise is None and path is not None and path.exists() else noise
    options = make_options(
        "100%", "lossy", gradient_noise, time_limit=time_limit, loss_fn=loss_fn, example_targets=example.targets,
        noise=known,
    )  # fmt: skip
    captured = capture(model, example.inputs)
    batch = Batch(model, flatten_call(example.inputs, {})[1], loss_fn, example.targets)
    device = Device.this()
    prepared = prepare(captured, options, device, batch=batch)
    if known is None and path is not None and prepared.noise is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        prepared.noise.save(path)
    return Ground(model, example, loss_fn, captured, device, options, prepared, batch)


def recompute_only(prepared: Prepared) -> Problem:
    """Return the Problem without codecs."""
    from graphplan.lower import without_codecs

    return without_codecs(prepared.problem, prepared.instructions)


def without_encoded(instructions: Instructions) -> Instructions:
    """Return the instructions of the Problem without codecs: they stand first."""
    encoded = {e.id for e in instructions.encoded}
    items = tuple(i for i in instructions.items if encoded.isdisjoint((*i.reads, *i.writes)))
    return replace(instructions, items=items, encoded=())


def turn_only(problem: Problem, across_bytes: int = 0) -> Problem:
    """Return the Problem in which only what is held between forward and backward counts: `across_bytes` of it."""
    turn = problem.program[problem.turn]
    ops = tuple(replace(op, workspace_bytes=FAR if i == turn else 0) for i, op in enumerate(problem.ops))
    return replace(problem, ops=ops, fixed_bytes=0, budget_bytes=FAR + across_bytes)


def held_at_turn(problem: Problem, schedule: Schedule) -> int:
    """Return the bytes of values that a schedule holds between forward and backward."""
    from solvers import live_at

    at = schedule.index(problem.program[problem.turn])
    written = set(problem.ops[schedule[at]].writes)
    return sum(problem.value_bytes[v] for v in live_at(problem, schedule, at) if v not in written)


def plan_of(ground: Ground, schedule: Sequence[int]) -> Plan:
    """Return the Plan that runs this schedule, under a budget that it fits."""
    from graphplan.lift import lift
    from solvers import Solution, Status, simulate

    problem = ground.prepared.problem
    peak = simulate(problem, tuple(schedule)).peak_bytes
    prepared = replace(ground.prepared, problem=problem.with_budget(peak))
    return lift(prepared, Solution(Status.FEASIBLE, tuple(schedule), 0, "any plan", "bench"), peak)


def joint_noise(ground: Ground, schedule: Sequence[int]) -> Any:
    """Return the JointNoise of a schedule: one exact and one encoded backward for each key."""
    from graphplan.noise import measure_noise
    from graphplan.rewrite import rewrite

    names = [ground.prepared.problem.ops[o].name for o in schedule]
    rewritten = rewrite(ground.captured.graph, ground.prepared.instructions, names)
    assert ground.prepared.noise is not None
    return measure_noise(ground.captured, rewritten, ground.batch, ground.prepared.noise.weights)
