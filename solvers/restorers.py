"""How a value can be written again: by the program op itself, or by an optional op that restores some of its writes."""

from __future__ import annotations

from solvers.problem import Kind, OpId, Problem, ValueId


def restorers(problem: Problem) -> dict[ValueId, OpId]:
    """Return {forward value: op that may write it a second time}; codecs are left out.

    A repeatable program op restores what it writes; where the op runs once (a dropout, a BatchNorm), the variant
    that writes most of the value's companions does.
    """
    found: dict[ValueId, OpId] = {}
    forward = problem.program[: problem.turn]
    for o in forward:
        if problem.ops[o].repeatable:
            found.update(dict.fromkeys(problem.ops[o].writes, o))
    first = set(forward)
    variants = [
        o
        for o, op in enumerate(problem.ops)
        if op.instead_of in first and op.kind is Kind.COMPUTE and not problem.ops[op.instead_of].repeatable
    ]
    for o in sorted(variants, key=lambda o: (len(problem.ops[o].writes), o)):
        found.update(dict.fromkeys(problem.ops[o].writes, o))
    return found
