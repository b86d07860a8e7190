"""The pipeline: capture, profile, lower, solve, lift, rewrite. `optimize` and `apply` are its two doors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import solvers
from graphplan import nested
from graphplan.bare import noise_of_codes, with_noise_measured
from graphplan.capture import Capture, capture, flatten_call
from graphplan.codecs import Lossy, choose_codecs
from graphplan.device import Device
from graphplan.errors import GraphplanError, PlanMismatch
from graphplan.graph import Graph
from graphplan.instructions import Codec, Instructions, instructions_of
from graphplan.lift import Prepared, infeasible, lift, schedule_of
from graphplan.lower import lower, noise_ppb, outputs_bytes
from graphplan.measure import SCALARS_BYTES, LossMemory, loss_memory, tensors_bytes
from graphplan.noise import Noise
from graphplan.plan import Plan
from graphplan.profile import profile
from graphplan.progress import Report, quiet
from graphplan.release import can_release
from graphplan.replay import Batch
from graphplan.units import check_budget, parse_budget
from graphplan.unplanned import unplanned_peak
from solvers import Limits, Schedule, Solution, simulate

LEAST_PEAK_SHARE = 0.4  # of the time limit, for finding what would be feasible
ANY_NOISE_PPB = 1 << 62
TIGHTENINGS = 3


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; checked by `make_options`."""

    budget: int | str
    codecs: tuple[Codec, ...]
    solver: str
    time_limit: float
    device: Device | None
    loss_fn: Callable[..., Tensor] | None
    example_targets: Any
    gradient_noise: float = 0.1
    noise: Noise | None = None
    report: Report = quiet
    whole_step: bool = False  # the loss and the update are in the graph: the caller does nothing between
    weights: str = "sgd"  # how noise is weighed where it is estimated; see `graphplan.noise`
    released: frozenset[str] = frozenset()  # what a plan made elsewhere says of its loss, where there is no loss_fn

    @property
    def codec_names(self) -> tuple[str, ...]:
        """Names of the codecs, as a Plan stores them."""
        return tuple(c.name for c in self.codecs)


@dataclass(frozen=True, slots=True)
class Source:
    """How to capture a step, and the batch on which the noise of lossy codes is measured (None: it is not).

    `captures` gives the forms of the step, of which `graphplan.choices` takes one; the first is the step as it is.
    """

    captures: Callable[[], tuple[Capture, ...]]
    batch: Batch | None = None
    in_parts: Callable[[int], Capture] | None = None  # on that many parts of the batch; raises NoParts

    def to_the_bit(self) -> tuple[Capture, ...]:
        """Return the form that computes every bit as the step does, in the least memory."""
        return tuple(c for c in self.captures() if not c.roomy)[:1]

    @staticmethod
    def of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options) -> Source:
        """Return the source of a model called with these arguments."""
        batch = Batch(model, flatten_call(args, kwargs)[1], options.loss_fn, options.example_targets)
        return Source(lambda: (capture(model, args, kwargs),), batch)


def make_options(
    budget: int | str,
    codecs: str | Iterable[str] = "exact",
    gradient_noise: float = 0.1,
    solver: str = "auto",
    time_limit: float = 30.0,
    device: Device | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    example_targets: Any = None,
    report: Report = quiet,
    noise: Noise | None = None,
) -> Options:
    """Check what can be checked before the model is seen, and return it as Options.

    Raises:
        BudgetError, UnknownCodec, GraphplanError: what was wrong and what would work.
    """
    check_budget(budget)
    if solver not in solvers.SOLVERS:
        raise GraphplanError(f"no solver {solver!r}; choose from {', '.join(solvers.SOLVERS)}")
    if not time_limit > 0:
        raise GraphplanError(f"time_limit {time_limit!r} must be a positive number of seconds")
    if not 0 <= gradient_noise <= 1:
        raise GraphplanError(f"gradient_noise {gradient_noise!r} must be between 0 and 1")
    if device is not None and not isinstance(device, Device):
        raise GraphplanError(f"device must be a graphplan.Device, got {type(device).__name__}")
    if noise is not None and not isinstance(noise, Noise):
        raise GraphplanError(f"noise must be a graphplan.Noise, got {type(noise).__name__}; use Noise.load(path)")
    return Options(
        budget=budget,
        codecs=choose_codecs(codecs),
        solver=solver,
        time_limit=float(time_limit),
        device=device,
        loss_fn=loss_fn,
        example_targets=example_targets,
        gradient_noise=float(gradient_noise),
        noise=noise,
        report=report,
    )


def prepare(
    captured: Capture,
    options: Options,
    device: Device,
    *,
    run: bool = True,
    batch: Batch | None = None,
    known: Noise | None = None,
) -> Prepared:
    """Profile a captured graph and state its Problem under the budget.

    The noise of lossy codes is `options.noise`, or what is `known` of the same activations in another shape, or
    estimated on `batch`; with none of these they are not used.

    Raises:
        BudgetError: the budget is malformed.
    """
    graph = captured.graph
    outside = _outside(captured, options)
    instructions = instructions_of(graph, options.codecs, _released(graph, outside, options))
    for codec in options.codecs if run else ():
        if isinstance(codec, Lossy):
            codec.warm_up(graph)
    costs = profile(graph, instructions, device, run=run, progress=options.report)
    targets = 0 if options.whole_step else tensors_bytes(options.example_targets)
    noise = noise_of(captured, instructions, options, batch, known)
    cap = options.gradient_noise if noise is not None else 0.0
    held = outside.held_bytes + targets
    problem = lower(graph, instructions, costs, outside.peak_bytes, held, noise=noise, gradient_noise=cap)
    baseline = unplanned_peak(problem, graph, instructions)
    problem = problem.with_budget(parse_budget(options.budget, baseline))
    return Prepared(
        graph=graph,
        instructions=instructions,
        profile=costs,
        device=device,
        codecs=options.codec_names,
        outside_bytes=outside.peak_bytes,
        loss_measured=options.whole_step or options.loss_fn is not None,
        problem=problem,
        baseline_peak_bytes=baseline,
        baseline_cost_ns=problem.program_cost_ns(),
        noise=noise,
    )


def _outside(captured: Capture, options: Options) -> LossMemory:
    """Return what the caller's loss holds."""
    if options.whole_step:
        return LossMemory(0, 0)
    if options.loss_fn is not None:
        return loss_memory(captured, options.loss_fn, options.example_targets)
    return LossMemory(3 * outputs_bytes(captured.graph), SCALARS_BYTES)


def _released(graph: Graph, outside: LossMemory, options: Options) -> frozenset[str]:
    """Return the tangents that the loss lets go of: as it was seen, or where there is none, as a plan says."""
    if options.loss_fn is None:
        return options.released.intersection(t or "" for t in graph.tangents if can_release())
    return frozenset(t for i in outside.released if (t := graph.tangents[i]) is not None)


def noise_of(
    captured: Capture, instructions: Instructions, options: Options, batch: Batch | None, known: Noise | None
) -> Noise | None:
    """Return the noise of the lossy codes that are offered, None when there are none or nothing is known."""
    activations = {captured.graph.storages[e.of].name for e in instructions.encoded if e.lossy}
    if options.noise is not None or batch is None or not activations:
        return options.noise
    if known is not None and known.rho.keys() >= activations:
        return known
    return noise_of_codes(captured, instructions, options.codecs, batch, options.weights, options.report)


def find_least(prepared: Prepared, options: Options) -> Solution:
    """Return the plan with the smallest peak that can be found; it does not depend on the budget.

    Its `single_peak_bytes` are those of plans without codecs.
    """
    options.report("least feasible peak", 0, 1)
    found = nested.least_peak(prepared, LEAST_PEAK_SHARE * options.time_limit)
    options.report("least feasible peak", 1, 1)
    return found


def make_plan(prepared: Prepared, least: Solution, options: Options, known: tuple[Schedule, ...] = ()) -> Plan:
    """Solve, and return the Plan; `least` is `find_least`'s answer for the same graph.

    `known` are schedules of plans made for it at other budgets: with those of smaller ones, cost cannot rise.

    Raises:
        InfeasibleBudget: nothing fits; the error says what would.
    """
    # Known schedules are candidates wherever they fit: a plan exists at every budget from `least`'s peak up.
    found = () if least.schedule is None else (least.schedule,)
    limits = Limits(seconds=options.time_limit, known=(*found, *known))
    options.report("solving", 0, 1)
    solution = nested.solve(prepared, options.solver, limits, least)
    options.report("solving", 1, 1)
    assert least.least_peak_bytes is not None
    if solution.schedule is None:
        raise infeasible(prepared, min(least.least_peak_bytes, solution.least_peak_bytes or least.least_peak_bytes))
    return lift(prepared, solution, least.least_peak_bytes)


def check_noise(
    captured: Capture, prepared: Prepared, plan: Plan, options: Options, batch: Batch | None
) -> tuple[Prepared, Plan]:
    """Measure the noise of a plan's codes all at once, and plan again with larger estimates while it breaks the cap.

    A plan whose codes still do after TIGHTENINGS is answered without any.
    """
    for tries in range(TIGHTENINGS + 1):
        if plan.noise == 0 or prepared.noise is None or batch is None:
            break
        options.report("noise of the plan", 0, 1)
        (measured,), factor = with_noise_measured(captured, prepared, (plan,), batch, options.weights)
        options.report("noise of the plan", 1, 1)
        if factor == 1:
            return prepared, measured
        prepared = with_noise(prepared, prepared.noise.times(factor if tries < TIGHTENINGS else math.inf))
        plan = make_plan(prepared, find_least(prepared, options), options)
    return prepared, plan


def with_noise(prepared: Prepared, noise: Noise) -> Prepared:
    """Return the same with other estimates."""
    graph, codes = prepared.graph, {e.id: e for e in prepared.instructions.encoded if e.lossy}
    ops = list(prepared.problem.ops)
    for i, item in enumerate(prepared.instructions.items):
        for s in item.writes if item.kind == "encode" else ():
            if s in codes:
                ops[i] = replace(ops[i], noise_ppb=noise_ppb(graph, codes[s], noise))
    return replace(prepared, problem=replace(prepared.problem, ops=tuple(ops)), noise=noise)


def check_plan(captured: Capture, prepared: Prepared, plan: Plan) -> None:
    """Check that `plan` can run on the captured graph and fits its budget here.

    Raises:
        PlanMismatch: another graph, an unknown op, an order that cannot run, or a peak above the budget.
    """
    schedule = schedule_of(prepared, plan.steps)
    try:
        # Its noise was judged where it was estimated; here perhaps nothing is known of it.
        usage = simulate(replace(prepared.problem, noise_limit_ppb=ANY_NOISE_PPB), schedule)
    except solvers.InvalidSchedule as e:
        raise PlanMismatch(f"the plan cannot run on graph {captured.graph.name}: {e}") from e
    if usage.peak_bytes > plan.budget_bytes:
        raise PlanMismatch(f"the plan needs {usage.peak_bytes} bytes here; its budget is {plan.budget_bytes}")


def check_fingerprint(plan: Plan, graph: Graph) -> None:
    """Raise PlanMismatch unless `plan` was made for `graph`."""
    if plan.fingerprint == graph.fingerprint:
        return
    made = "" if plan.torch_version == torch.__version__ else f", made with torch {plan.torch_version}"
    raise PlanMismatch(
        f"the plan is for {plan.model}, graph {plan.fingerprint}{made}; this is {graph.name}, graph "
        f"{graph.fingerprint} (torch {torch.__version__}): the same model code, shapes and torch are needed"
    )


def carry(plan: Plan, prepared: Prepared, options: Options) -> Plan | None:
    """Return `plan`'s decisions for a graph of the same ops at other sizes, or None if they do not fit there."""
    try:
        schedule = schedule_of(prepared, plan.steps)
        usage = simulate(prepared.problem, schedule)
    except (PlanMismatch, solvers.InvalidSchedule):
        return None
    if usage.peak_bytes > prepared.problem.budget_bytes:
        return None
    solution = Solution(
        solvers.Status.FEASIBLE,
        schedule,
        prepared.problem.program_cost_ns(),
        "any plan",
        f"{plan.solver} (carried)",
        any_bound_ns=prepared.problem.program_cost_ns(),
    )
    return lift(prepared, solution, plan.minimum_peak_bytes)


def device_of(model: nn.Module, captured: Capture) -> Any:
    """Return the torch device of the model's tensors."""
    first = next(iter(captured.graph.module.graph.find_nodes(op="placeholder")), None)
    return first.meta["val"].device if first is not None else next(model.parameters()).device
