"""Ops that read several encodings: what runs where two or more fates each want an alternative for the same op.

An attention's backward may read codes of its queries and of its result. Each code has its own alternative, which reads
the other activation as it is; where both activations are encoded, the *joint* alternative stands in for the op. It is
one only where it costs what its parts add to the op, and takes no more, so that fates are priced each for itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from solvers.fates import Fate, scratch_bytes
from solvers.problem import Kind, OpId, Problem

Joint = dict[frozenset[OpId], OpId]  # alternatives for one op -> what runs for all of them


def spared_bytes(problem: Problem, joint: OpId, parts: frozenset[OpId]) -> int:
    """Return how much less workspace a joint alternative takes than its parts add to the op."""
    own = problem.ops[joint].instead_of
    assert own is not None
    apart = sum(scratch_bytes(problem, p) for p in parts) - (len(parts) - 1) * scratch_bytes(problem, own)
    return apart - scratch_bytes(problem, joint)


def joint_alternatives(problem: Problem, fates: Iterable[Fate]) -> Joint:
    """Return the joint alternatives of `problem` for those that fates name.

    Of an op whose alternatives go together by twos, but not all of them that do, none are returned.
    """
    encoder = {v: o for o, op in enumerate(problem.ops) if op.kind is Kind.ENCODE for v in op.writes}
    alone: dict[tuple[OpId, OpId], OpId] = {}  # (program op, encode) -> alternative
    for fate in fates:
        if fate.encode is not None:
            alone.update({(q, fate.encode): o for q, o in fate.instead})
    found: dict[OpId, Joint] = {}
    for o, op in enumerate(problem.ops):
        encodes = {encoder[v] for v in op.reads if v in encoder}
        if op.instead_of is None or len(encodes) < 2:
            continue
        parts = [alone.get((op.instead_of, e)) for e in encodes]
        known = frozenset(p for p in parts if p is not None)
        if len(known) == len(parts) and _adds_up(problem, o, known):
            found.setdefault(op.instead_of, {})[known] = o
    return {parts: o for own in found.values() if _closed(own) for parts, o in own.items()}


def _adds_up(problem: Problem, joint: OpId, parts: frozenset[OpId]) -> bool:
    """Return whether an op writes, reads and costs what its parts do together, and takes no more."""
    ops, op, more = problem.ops, problem.ops[joint], len(parts) - 1
    own = op.instead_of
    assert own is not None
    spared = set(ops[own].reads).intersection(*(ops[p].reads for p in parts))
    codes = {v for p in parts for v in set(ops[p].reads) - set(ops[own].reads)}
    return (
        set(op.writes) == set(ops[own].writes)
        and set(op.reads) <= spared | codes
        and op.cost_ns == sum(ops[p].cost_ns for p in parts) - more * ops[own].cost_ns
        and spared_bytes(problem, joint, parts) >= 0
    )


def _closed(joint: Joint) -> bool:
    """Return whether alternatives that go together by twos all do."""
    each = frozenset[OpId]().union(*joint)

    def fit(p: OpId, some: frozenset[OpId]) -> bool:
        return all(frozenset((p, other)) in joint for other in some)

    return all(all(fit(p, some - {p}) for p in some) for some in joint) and all(
        some | {p} in joint for some in joint for p in each - some if fit(p, some)
    )
