"""lift: Solution -> Plan. Names the schedule's ops and says, in the graph's words, what was decided and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import solvers
from graphplan.device import Device
from graphplan.errors import InfeasibleBudget, PlanMismatch
from graphplan.graph import Graph, StorageKind
from graphplan.instructions import Instructions
from graphplan.lower import values_of
from graphplan.noise import PPB, Noise
from graphplan.plan import Decision, Plan
from graphplan.profile import Profile
from graphplan.units import format_bytes
from graphplan.unplanned import asking_inputs, with_wide_masks
from solvers import Problem, Schedule, Solution, simulate

PEAK_ROWS = 12


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that planning needs and that execution checks: a graph's Problem and where it came from."""

    graph: Graph
    instructions: Instructions
    profile: Profile
    device: Device
    codecs: tuple[str, ...]
    outside_bytes: int
    loss_measured: bool
    problem: Problem
    baseline_peak_bytes: int
    baseline_cost_ns: int
    noise: Noise | None = None  # of lossy codes, where any is allowed and it was estimated or given


def lift(prepared: Prepared, solution: Solution, minimum_bytes: int) -> Plan:
    """Return the Plan of a Solution that has a schedule."""
    problem, graph = prepared.problem, prepared.graph
    assert solution.schedule is not None
    usage = simulate(problem, solution.schedule)
    live = solvers.live_at(problem, solution.schedule, usage.peak_step)
    rows = tuple((problem.value_names[v], problem.value_bytes[v]) for v in live[:PEAK_ROWS])
    return Plan(
        model=graph.name,
        fingerprint=graph.fingerprint,
        steps=tuple(problem.ops[o].name for o in solution.schedule),
        decisions=_decide(prepared, solution.schedule),
        budget_bytes=problem.budget_bytes,
        peak_bytes=usage.peak_bytes,
        baseline_peak_bytes=prepared.baseline_peak_bytes,
        minimum_peak_bytes=min(minimum_bytes, usage.peak_bytes),
        fixed_bytes=problem.fixed_bytes,
        outside_bytes=prepared.outside_bytes,
        loss_measured=prepared.loss_measured,
        cost_ns=usage.cost_ns,
        baseline_cost_ns=prepared.baseline_cost_ns,
        lower_bound_ns=solution.lower_bound_ns,
        bound_class=solution.bound_class,
        any_bound_ns=solution.any_bound_ns,
        status=solution.status.name.lower(),
        solver=solution.solver,
        codecs=prepared.codecs,
        peak_step=problem.ops[solution.schedule[usage.peak_step]].name,
        peak_live=rows,
        minimum_reason=minimum_reason(problem),
        device=prepared.device.name,
        torch_version=torch.__version__,
        measured=prepared.profile.measured,
        gradient_noise=problem.noise_limit_ppb / PPB,
        noise=usage.noise_ppb / PPB,
        noise_measured=None if usage.noise_ppb else 0.0,
        noise_bias=None if usage.noise_ppb else 0.0,
        update=graph.update,
        saved=_saved(prepared, solution.schedule, usage.peak_bytes),
        released=tuple(sorted(prepared.instructions.released)),
    )


def _saved(prepared: Prepared, schedule: Schedule, peak_bytes: int) -> tuple[tuple[str, int], ...]:
    """Return what memory each way of using it early or twice saves: the same schedule's peak without it."""
    problem, items = prepared.problem, prepared.instructions.items
    without = {
        "writing over operands that die": problem.out_of_place(),
        "asking results in place of inputs": asking_inputs(problem, prepared.graph, prepared.instructions),
        "keeping dropout's masks as booleans": with_wide_masks(problem, prepared.graph, prepared.instructions),
    }
    if prepared.graph.update:
        ops = prepared.graph.ops
        updates = {op.name for op in ops if "graphplan_update" in op.node.meta and len(op.node.args) == 4}
        held = [v for o, item in enumerate(items) if item.name in updates for v in problem.ops[o].reads]
        end = problem.program[-1]
        last = replace(problem.ops[end], reads=tuple(dict.fromkeys((*problem.ops[end].reads, *held))))
        held_ops = (*problem.ops[:end], last, *problem.ops[end + 1 :])
        without["applying gradients where they are final"] = replace(problem, ops=held_ops)
    without.update(_unsplit(prepared))
    peaks = {what: simulate(other, schedule).peak_bytes - peak_bytes for what, other in without.items()}
    return tuple((what, n) for what, n in peaks.items() if n > 0)


def _unsplit(prepared: Prepared) -> dict[str, Problem]:
    """Return the Problem with the ops that work in parts as large as if they did not, by how they do it."""
    ops, items = prepared.graph.ops, prepared.instructions.items
    grown: dict[str, dict[int, int]] = {}
    for o, item in enumerate(items):
        what, nbytes = ("", 0) if item.op is None else ops[item.op].node.meta.get("graphplan_saves", ("", 0))
        if what:
            grown.setdefault(what, {})[o] = nbytes
    return {
        what: replace(
            prepared.problem,
            ops=tuple(
                replace(op, workspace_bytes=op.workspace_bytes + more.get(o, 0))
                for o, op in enumerate(prepared.problem.ops)
            ),
        )
        for what, more in grown.items()
    }


def schedule_of(prepared: Prepared, steps: tuple[str, ...]) -> Schedule:
    """Return the schedule that `steps` name.

    Raises:
        PlanMismatch: a step that this graph does not offer.
    """
    index = prepared.instructions.by_name()
    unknown = next((s for s in steps if s not in index), None)
    if unknown is not None:
        raise PlanMismatch(f"the plan names op {unknown!r}, which graph {prepared.graph.name} does not have")
    return tuple(index[s] for s in steps)


def infeasible(prepared: Prepared, minimum_bytes: int) -> InfeasibleBudget:
    """Return the error that says what is needed, what binds and what would help."""
    problem = prepared.problem
    bound = solvers.working_set(problem)
    op = problem.ops[bound.op].name
    message = (
        f"{prepared.graph.name} needs at least {format_bytes(minimum_bytes)} ({minimum_bytes} bytes); the budget is "
        f"{format_bytes(problem.budget_bytes)}, the unplanned step uses {format_bytes(prepared.baseline_peak_bytes)}. "
        f"{minimum_reason(problem)}. Raise the budget, use a smaller batch"
    )
    if not prepared.codecs:
        message += ', or allow codecs="exact"'
    return InfeasibleBudget(message + ".", minimum_bytes=minimum_bytes, binding_op=op)


def minimum_reason(problem: Problem) -> str:
    """Return what sets the floor of any plan: the op whose inputs, outputs and company are largest."""
    bound = solvers.working_set(problem)
    parts = (
        ("parameters and inputs", bound.fixed_bytes),
        ("gradients and outputs", bound.keep_bytes),
        ("what it reads", bound.read_bytes),
        ("what it writes", bound.write_bytes),
        ("its workspace", bound.workspace_bytes),
        ("what must wait for later ops", bound.other_bytes),
    )
    shown = ", ".join(f"{what} {format_bytes(n)}" for what, n in parts if n)
    return f"op {problem.ops[bound.op].name!r} alone takes {format_bytes(bound.peak_bytes)}: {shown}"


def _decide(prepared: Prepared, schedule: Schedule) -> dict[str, Decision]:
    """Read each activation's fate off what is live between forward and backward."""
    problem, graph = prepared.problem, prepared.graph
    turn = schedule.index(problem.program[problem.turn])
    live = set(solvers.live_at(problem, schedule, turn))
    index = {s: v for v, s in enumerate(values_of(graph, prepared.instructions))}
    held = {e.of: e for e in prepared.instructions.encoded if index[e.id] in live}
    decisions = {}
    for s in graph.storages:
        if s.kind is not StorageKind.ACTIVATION or s.id not in index:
            continue
        if index[s.id] in live:
            decisions[s.name] = Decision("keep", s.nbytes)
        elif s.id in held:
            e = held[s.id]
            decisions[s.name] = Decision("compress", s.nbytes, e.codec, e.nbytes)
        else:
            decisions[s.name] = Decision("recompute", s.nbytes)
    return decisions
