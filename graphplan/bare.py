"""bare: what codes add to the gradient, each and in a plan; of a whole step, on the same step up to its gradients."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace

from graphplan.capture import Capture
from graphplan.codecs import choose_codecs
from graphplan.graph import Graph
from graphplan.instructions import Codec, Instructions, instructions_of
from graphplan.lift import Prepared
from graphplan.noise import BIAS_LIMIT, JointNoise, Noise, Report, estimate, measure_each
from graphplan.plan import Plan
from graphplan.replay import Batch
from graphplan.rewrite import Rewritten, rewrite


def noise_of_codes(
    captured: Capture,
    instructions: Instructions,
    codecs: Sequence[Codec],
    batch: Batch,
    weights: str,
    report: Report,
) -> Noise:
    """Return the noise of every lossy code that `instructions` of `codecs` offer; see `graphplan.noise.estimate`."""
    if captured.bare is None:
        return estimate(captured, instructions, batch, weights, report)
    return estimate(captured.bare, instructions_of(captured.bare.graph, codecs), batch, weights, report)


def with_noise_measured(
    captured: Capture, prepared: Prepared, plans: Sequence[Plan], batch: Batch, weights: str
) -> tuple[list[Plan], float]:
    """Return the plans with what their codes add, and by how much larger estimates are to be: 1 where the cap holds."""
    joint = iter(noise_of_plans(captured, prepared, [p for p in plans if p.noise], batch, weights))
    found, factor = [], 1.0
    for plan in plans:
        if plan.noise:
            own = next(joint)
            if own.noise > plan.gradient_noise or own.bias > BIAS_LIMIT:
                factor = max(factor, 2.0, own.noise / plan.noise)
            plan = replace(plan, noise_measured=own.noise, noise_bias=own.bias)
        found.append(plan)
    return found, factor


def noise_of_plans(
    captured: Capture, prepared: Prepared, plans: Iterable[Plan], batch: Batch, weights: str
) -> list[JointNoise]:
    """Return what the codes of each plan together add to the gradient of `batch`, weighed as its estimates were.

    `weights` are those where nothing was estimated here.
    """
    weights = weights if prepared.noise is None else prepared.noise.weights
    return list(measure_each(captured.bare or captured, _programs(captured, prepared, plans), batch, weights))


def _programs(captured: Capture, prepared: Prepared, plans: Iterable[Plan]) -> Iterator[Rewritten]:
    bare = captured.bare
    for plan in plans:
        if bare is None:
            yield rewrite(captured.graph, prepared.instructions, plan.steps)
        else:
            instructions = instructions_of(bare.graph, choose_codecs(plan.codecs))
            steps = steps_to_gradients(captured.graph, bare.graph, instructions.by_name(), plan.steps)
            yield rewrite(bare.graph, instructions, steps)


def steps_to_gradients(whole: Graph, bare: Graph, known: Container[str], steps: Sequence[str]) -> list[str]:
    """Return the steps of a plan of `whole` as steps of `bare`, the same step up to its gradients.

    `known` are the names of the instructions of `bare`. An update that computes its gradient in pieces stands where
    `bare` computes it.
    """
    nodes, own, writer = whole.nodes, {op.name for op in whole.ops}, {s: op.name for op in bare.ops for s in op.writes}
    gradients = {p.node: g for p, g in zip(bare.primals, bare.gradients, strict=True) if g is not None}
    found: list[str] = []
    for step in steps:
        if step in known:
            found.append(step)
            continue
        node = nodes.get(step)
        if node is None or "graphplan_update" not in node.meta:
            continue
        made = [writer[s] for s in bare.storages_of[gradients[node.all_input_nodes[0].name]] if s in writer]
        found.extend(name for name in made if name not in own)
    return found
