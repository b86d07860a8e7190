"""The planning problem and its answer: numbers only, no torch.

A *schedule* is a sequence of op ids. An op that stands twice is recomputed; a codec is an encode op and a
decode op. Nothing is ever freed in a schedule: a value lives from its write to its last read before the next
write. `simulate` (beside this file) is the one definition of "fits".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

OpId = int
ValueId = int
Schedule = tuple[OpId, ...]

FORMAT = "graphplan-problem-1"


class MalformedProblem(ValueError):
    """A Problem (or its JSON) breaks an invariant; the message names the place."""


class Kind(Enum):
    """What an op is for: the model's own work, or one half of a codec."""

    COMPUTE = "compute"
    ENCODE = "encode"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Op:
    """One executable step: reads values, writes values, costs time and scratch memory.

    `repeatable` is False for an op that must run exactly once, in the program's order: it draws random numbers,
    updates a buffer, or is the turn from forward to backward. `instead_of` names the program op whose values (all or
    some) this op can also write: a BatchNorm without its statistics update, a backward op that reads an encoding. Such
    an op, and every encode and decode, is *optional*: it stands outside the program. `takes_over` names a value that
    it reads and whose memory one of its writes uses, wherever that read is the value's last and the value was written
    on the same side of the turn: an operand written over in place. `noise_ppb` is what a lossy encode adds to the
    gradient: error variance over the gradient's own, in parts per billion. A schedule counts it once however often the
    op stands there: the same code has the same error.
    """

    name: str
    reads: tuple[ValueId, ...]
    writes: tuple[ValueId, ...]
    cost_ns: int
    workspace_bytes: int = 0
    repeatable: bool = True
    instead_of: OpId | None = None
    kind: Kind = Kind.COMPUTE
    takes_over: ValueId | None = None
    noise_ppb: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """Which schedule is fastest while never more than `budget_bytes` are in use?

    `program` is the default schedule, a permutation of the ops that are not optional: it runs every op once.
    `turn` is the index in `program` of the op that stands between forward and backward. Parameters, buffers
    and inputs are not values: they are `fixed_bytes`. `keep` are the values that must be live at the end.
    `noise_limit_ppb` caps the sum of `noise_ppb` over the ops of a schedule.
    """

    name: str
    ops: tuple[Op, ...]
    program: tuple[OpId, ...]
    turn: int
    value_bytes: tuple[int, ...]
    value_names: tuple[str, ...]
    keep: frozenset[ValueId]
    fixed_bytes: int
    budget_bytes: int
    noise_limit_ppb: int = 0

    def verify(self) -> None:
        """Raise MalformedProblem, naming the op and the value, unless the problem is well formed."""
        _check_ids(self)
        _check_program(self)
        _check_take_overs(self)

    def with_budget(self, budget_bytes: int) -> Problem:
        """Return the same problem under another budget."""
        return replace(self, budget_bytes=budget_bytes)

    def out_of_place(self) -> Problem:
        """Return the same problem with every op writing memory of its own."""
        return replace(self, ops=tuple(replace(op, takes_over=None) for op in self.ops))

    def program_cost_ns(self) -> int:
        """Return the cost of running every op of the program once."""
        return sum(self.ops[o].cost_ns for o in self.program)

    def to_json(self) -> str:
        """Return the problem as JSON text, one op a line."""
        head = {k: v for k, v in asdict(self).items() if k != "ops"}
        head["keep"] = sorted(self.keep)
        ops = [json.dumps({**asdict(op), "kind": op.kind.value}) for op in self.ops]
        body = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in head.items())
        return f'{{"format": "{FORMAT}",\n{body},\n"ops": [\n' + ",\n".join(ops) + "\n]}\n"

    @staticmethod
    def from_json(text: str) -> Problem:
        """Read a problem written by `to_json`; raise MalformedProblem on anything else."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise MalformedProblem(f"not JSON (truncated?): {e}") from e
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise MalformedProblem(f"expected format {FORMAT!r}")
        try:
            problem = _from_dict(data)
        except (KeyError, TypeError, ValueError) as e:
            raise MalformedProblem(f"missing or wrong field: {e}") from e
        problem.verify()
        return problem


class Status(Enum):
    """How a search ended; the value says what it means for the user."""

    OPTIMAL = "proven optimal in its class"
    FEASIBLE = "fits; not proven optimal"
    INFEASIBLE = "proven: no plan of this class fits the budget"
    NOT_FOUND = "no plan found within the limits; more time or a larger budget may help"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a solver may spend, and who listens. The answer is a function of these and the problem."""

    seconds: float = 30.0
    threads: int = 2
    seed: int = 0
    gap: float = 0.0001  # stop when (cost - bound) / cost is at most this
    progress: Callable[[Progress], None] | None = None
    cancelled: Callable[[], bool] | None = None
    known: tuple[Schedule, ...] = ()  # candidates wherever they fit: of `least_peak`, of a smaller budget


@dataclass(frozen=True, slots=True)
class Progress:
    """One line of a running search: costs in ns, None while unknown."""

    solver: str
    seconds: float
    cost_ns: int | None
    lower_bound_ns: int | None


@dataclass(frozen=True, slots=True)
class Solution:
    """A solver's answer. `schedule` is present exactly when `status` is OPTIMAL or FEASIBLE.

    `solver` names who found the schedule, after a colon the stage of it that did. `lower_bound_ns` bounds the
    cost of every plan of class `bound_class`, `any_bound_ns` that of every plan in the program's order, however
    often it recomputes after the turn (0: not looked for). `least_peak_bytes` is the smallest peak that this search
    can vouch for reaching (None: it did not look); `single_peak_bytes`, of `least_peak` alone, is that of plans with
    one recompute a value.
    """

    status: Status
    schedule: Schedule | None
    lower_bound_ns: int
    bound_class: str
    solver: str
    seconds: float = field(compare=False, default=0.0)
    least_peak_bytes: int | None = None
    any_bound_ns: int = 0
    single_peak_bytes: int | None = None


def _from_dict(data: dict[str, Any]) -> Problem:
    ops = tuple(
        Op(**{**o, "reads": tuple(o["reads"]), "writes": tuple(o["writes"]), "kind": Kind(o["kind"])})
        for o in data["ops"]
    )
    return Problem(
        name=str(data["name"]),
        ops=ops,
        program=tuple(data["program"]),
        turn=int(data["turn"]),
        value_bytes=tuple(data["value_bytes"]),
        value_names=tuple(data["value_names"]),
        keep=frozenset(data["keep"]),
        fixed_bytes=int(data["fixed_bytes"]),
        budget_bytes=int(data["budget_bytes"]),
        noise_limit_ppb=int(data.get("noise_limit_ppb", 0)),
    )


def _check_ids(problem: Problem) -> None:
    values = range(len(problem.value_bytes))
    if len(problem.value_names) != len(values):
        raise MalformedProblem(f"{len(problem.value_names)} value names for {len(values)} values")
    if min(problem.value_bytes, default=0) < 0 or problem.fixed_bytes < 0 or problem.noise_limit_ppb < 0:
        raise MalformedProblem("negative bytes or noise limit")
    for i, op in enumerate(problem.ops):
        unknown = [v for v in (*op.reads, *op.writes) if v not in values]
        if unknown:
            raise MalformedProblem(f"op {i} {op.name!r} names unknown value {unknown[0]}")
        if op.cost_ns < 0 or op.workspace_bytes < 0:
            raise MalformedProblem(f"op {i} {op.name!r} has a negative cost or workspace")
        if op.instead_of is not None and op.instead_of not in range(len(problem.ops)):
            raise MalformedProblem(f"op {i} {op.name!r} stands for unknown op {op.instead_of}")
        if op.noise_ppb < 0 or (op.noise_ppb and op.kind is not Kind.ENCODE):
            raise MalformedProblem(f"op {i} {op.name!r} has noise {op.noise_ppb}: only an encode adds any")
    if not problem.keep <= frozenset(values):
        raise MalformedProblem("keep names an unknown value")


def _optional(problem: Problem) -> set[OpId]:
    optional = {i for i, op in enumerate(problem.ops) if op.instead_of is not None or op.kind is not Kind.COMPUTE}
    for i in optional:
        if not problem.ops[i].repeatable:
            raise MalformedProblem(f"op {i} {problem.ops[i].name!r} is optional, and must run exactly once")
    return optional


def _check_program(problem: Problem) -> None:
    optional = _optional(problem)
    if sorted(problem.program) != [i for i in range(len(problem.ops)) if i not in optional]:
        raise MalformedProblem("program is not a permutation of the ops that are not optional")
    if not 0 <= problem.turn < len(problem.program):
        raise MalformedProblem(f"turn {problem.turn} is not a position in the program")
    written: set[ValueId] = set()
    for o in problem.program:
        op = problem.ops[o]
        for v in op.reads:
            if v not in written:
                raise MalformedProblem(f"op {o} {op.name!r} reads value {v} before it is written")
        for v in op.writes:
            if v in written:
                raise MalformedProblem(f"op {o} {op.name!r} writes value {v}, which another program op writes")
        written.update(op.writes)
    if not problem.keep <= written:
        raise MalformedProblem("a value to keep is never written by the program")


def _check_take_overs(problem: Problem) -> None:
    position = {o: t for t, o in enumerate(problem.program)}
    write = {v: t for t, o in enumerate(problem.program) for v in problem.ops[o].writes}
    last: dict[tuple[ValueId, bool], int] = {}
    for t, o in enumerate(problem.program):
        last.update(((v, t > problem.turn), t) for v in problem.ops[o].reads)
    for i, op in enumerate(problem.ops):
        v = op.takes_over
        if v is None:
            continue
        where = f"op {i} {op.name!r} takes over value {v}"
        if v not in op.reads or not op.writes or v in op.writes:
            raise MalformedProblem(f"{where}, but does not read it and write another value")
        if problem.value_bytes[v] not in {problem.value_bytes[w] for w in op.writes}:
            raise MalformedProblem(f"{where}, which has another size than what it writes")
        t = position.get(i if op.instead_of is None else op.instead_of, problem.turn)
        if v in problem.keep or v not in write or t == problem.turn:
            raise MalformedProblem(f"{where}, which is kept to the end, or at the turn")
        if (write[v] >= problem.turn) != (t > problem.turn):
            raise MalformedProblem(f"{where}, which comes from the other side of the turn")
        if last[v, t > problem.turn] != t:
            raise MalformedProblem(f"{where}, which a later op of the same half reads")
