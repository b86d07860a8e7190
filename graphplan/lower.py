"""lower: Graph + Instructions + Profile -> Problem. Torch stops here: what comes out is numbers."""

from __future__ import annotations

import math
from dataclasses import replace

from graphplan.graph import Graph, StorageKind
from graphplan.instructions import Encoded, Instruction, Instructions
from graphplan.noise import PPB, REFUSED_PPB, Noise
from graphplan.profile import Profile
from solvers import Kind, Op, Problem

HOOK_BYTES = 256  # the scalars that a hook multiplies with
_KINDS = {"encode": Kind.ENCODE, "decode": Kind.DECODE}


def lower(
    graph: Graph,
    instructions: Instructions,
    profile: Profile,
    outside_bytes: int,
    resident_bytes: int,
    budget_bytes: int = 0,
    noise: Noise | None = None,
    gradient_noise: float = 0.0,
) -> Problem:
    """Return the Problem of running `graph` within `budget_bytes`.

    Op i of the problem is instruction i; value v is the storage `values_of(graph, instructions)[v]`.
    `outside_bytes` are what the caller's loss holds at most between forward and backward, the gradients that it
    hands back included; `resident_bytes` what it keeps for the whole step (targets, the loss itself). These and
    parameters, buffers, inputs and constants are `fixed_bytes`. Lossy encodes carry their `noise`, of which
    `gradient_noise` is allowed; without estimates none of them is.
    """
    values = values_of(graph, instructions)
    index = {s: v for v, s in enumerate(values)}
    names = {s.id: s.name for s in graph.storages} | {e.id: e.name for e in instructions.encoded}
    sizes = {s.id: s.nbytes for s in graph.storages} | {e.id: e.nbytes for e in instructions.encoded}
    noisy = {e.id: noise_ppb(graph, e, noise) for e in instructions.encoded if e.lossy}
    codes = {e.id for e in instructions.encoded}

    def to_op(i: int, item: Instruction) -> Op:
        original = None if i < len(instructions.program) else _stands_for(instructions, item)
        alternative = original if not codes.isdisjoint(item.reads) else None
        return Op(
            name=item.name,
            reads=tuple(index[s] for s in item.reads),
            writes=tuple(index[s] for s in item.writes),
            cost_ns=_cost(profile, i, alternative),
            workspace_bytes=profile.workspace_bytes[i],
            repeatable=item.repeatable,
            instead_of=original,
            kind=_KINDS.get(item.kind, Kind.COMPUTE),
            takes_over=None if item.takes_over is None else index[item.takes_over],
            noise_ppb=sum(noisy.get(s, 0) for s in item.writes),
        )

    ops = _summed(instructions, [to_op(i, item) for i, item in enumerate(instructions.items)])
    turn, end = instructions.turn, instructions.program[-1]
    tangents = sum(sizes[s] for s in instructions.items[turn].writes)
    ops[turn] = _with_workspace(ops[turn], max(0, outside_bytes - tangents))
    ops[end] = _with_workspace(ops[end], gradient_copies_bytes(graph) + hooked_bytes(graph))
    problem = Problem(
        name=graph.name,
        ops=tuple(ops),
        program=instructions.program,
        turn=turn,
        value_bytes=tuple(sizes[s] for s in values),
        value_names=tuple(names[s] for s in values),
        keep=frozenset(index[s] for s in graph.returned if s in index),
        fixed_bytes=graph.fixed_bytes + resident_bytes,
        budget_bytes=budget_bytes,
        noise_limit_ppb=math.floor(gradient_noise * PPB),
    )
    problem.verify()
    return problem


def noise_ppb(graph: Graph, code: Encoded, noise: Noise | None) -> int:
    """Return the noise of a lossy code."""
    return REFUSED_PPB if noise is None else noise.ppb(graph.storages[code.of].name, code.codec)


def without_codecs(problem: Problem, instructions: Instructions) -> Problem:
    """Return `problem` with nothing encoded. Codecs' ops and values stand last: its schedules are `problem`'s too."""
    encoded = {e.id for e in instructions.encoded}
    ops = sum(encoded.isdisjoint((*item.reads, *item.writes)) for item in instructions.items)
    values = len(problem.value_bytes) - len(encoded)
    return replace(
        problem,
        ops=problem.ops[:ops],
        value_bytes=problem.value_bytes[:values],
        value_names=problem.value_names[:values],
    )


def computing_once(problem: Problem) -> Problem:
    """Return `problem` with every forward computation run once: what is not kept must be encoded.

    Variants of forward ops, which exist to run them again, get a workspace that fits no budget.
    """
    forward = set(problem.program[: problem.turn])
    too_much = sum(problem.value_bytes) + problem.fixed_bytes + max(op.workspace_bytes for op in problem.ops)

    def once(o: int, op: Op) -> Op:
        if o in forward:
            return replace(op, repeatable=False)
        return replace(op, workspace_bytes=too_much) if op.instead_of in forward else op

    return replace(problem, ops=tuple(once(o, op) for o, op in enumerate(problem.ops)))


def values_of(graph: Graph, instructions: Instructions) -> tuple[int, ...]:
    """Return the storages that are values of the Problem, in its order: all but the fixed ones."""
    written = {s for item in instructions.items for s in item.writes}
    planned = [s.id for s in graph.storages if not s.kind.fixed and s.id in written]
    return (*planned, *(e.id for e in instructions.encoded))


def outputs_bytes(graph: Graph) -> int:
    """Return the bytes of the tensors that the model returns."""
    storages = {s for n in graph.forward_outputs for s in graph.storages_of[n]}
    return sum(graph.storages[s].nbytes for s in storages)


def gradient_copies_bytes(graph: Graph) -> int:
    """Return the bytes of gradients that autograd copies instead of keeping when it fills `.grad`.

    It keeps a gradient whose strides are the parameter's and that nobody else holds, and clones any other.
    """
    seen: set[str] = set()
    total = 0
    nodes = graph.nodes
    for primal, name in zip(graph.primals, graph.gradients, strict=True):
        if name is None:
            continue
        grad, param = nodes[name].meta["val"], nodes[primal.node].meta["val"]
        shared = name in seen or any(
            graph.storages[s].kind is not StorageKind.GRADIENT for s in graph.storages_of[name]
        )
        seen.add(name)
        if shared or grad.stride() != param.stride():
            total += grad.numel() * grad.element_size()
    return total


def hooked_bytes(graph: Graph) -> int:
    """Return the bytes of the largest gradient that a hook gets: what it returns instead exists beside it.

    Hooks of one parameter run after those of another, when the backward is done.
    """
    pairs = zip(graph.primals, graph.gradients, strict=True)
    values = [graph.nodes[name].meta["val"] for p, name in pairs if p.hooked and name is not None]
    return max((v.numel() * v.element_size() + HOOK_BYTES for v in values), default=0)


def _stands_for(instructions: Instructions, item: Instruction) -> int | None:
    return None if item.op is None else instructions.place(item.op)


def _cost(profile: Profile, i: int, alternative_to: int | None) -> int:
    """Return what an instruction costs: at least what it is the alternative to.

    What reads a code sometimes measures faster than what it replaces: of many such the noise would choose some, while
    where everything fits, everything is to be kept.
    """
    cost = profile.cost_ns[i]
    return cost if alternative_to is None else max(cost, profile.cost_ns[alternative_to])


def _summed(instructions: Instructions, ops: list[Op]) -> list[Op]:
    """Return the ops, joint ones priced as what each of their parts adds to the op in whose place they run."""
    for i, parts in instructions.joint().items():
        own = ops[i].instead_of
        assert own is not None
        more = sum(ops[o].cost_ns - ops[own].cost_ns for o in parts)
        ops[i] = replace(ops[i], cost_ns=ops[own].cost_ns + more)
    return ops


def _with_workspace(op: Op, workspace_bytes: int) -> Op:
    return replace(op, workspace_bytes=workspace_bytes)
