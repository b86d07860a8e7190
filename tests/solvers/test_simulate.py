"""`simulate` against numbers worked out by hand, against brute force, and against sabotage."""

from __future__ import annotations

import random

import pytest

from solvers import InvalidSchedule, Kind, Op, Problem, Solution, SolverBroken, Status, simulate, solve
from solvers.problem import Limits
from solvers.simulate import fits, live_at, take_overs
from tests.solvers.problems import random_problem


def chain() -> Problem:
    """x(4) a(8) b(2) turn t(1); b' reads a, t, writes g(3); a' reads x, g, writes h(5, kept)."""
    ops = (
        Op("x", (), (0,), 10),
        Op("a", (0,), (1,), 20, workspace_bytes=6),
        Op("b", (1,), (2,), 30),
        Op("turn", (2,), (3,), 0, repeatable=False),
        Op("b_backward", (1, 3), (4,), 40),
        Op("a_backward", (0, 4), (5,), 50, workspace_bytes=1),
        Op("pack", (1,), (6,), 7, kind=Kind.ENCODE),
        Op("unpack", (6,), (1,), 9, kind=Kind.DECODE),
    )
    return Problem("chain", ops, (0, 1, 2, 3, 4, 5), 3, (4, 8, 2, 1, 3, 5, 1), tuple("xabtghe"), frozenset({5}), 100, 0)


def test_keep_everything_by_hand() -> None:
    usage = simulate(chain(), (0, 1, 2, 3, 4, 5))
    # x | x a +6 | x a b | x a b t | x a t g | x g h +1
    assert usage.bytes_at == (104, 118, 114, 115, 116, 113)
    assert (usage.cost_ns, usage.peak_bytes, usage.peak_step) == (150, 118, 1)


def test_recompute_by_hand() -> None:
    usage = simulate(chain(), (0, 1, 2, 3, 1, 4, 5))
    # a dies after b, comes back for b_backward with its scratch: x t a +6
    assert usage.bytes_at == (104, 118, 114, 107, 119, 116, 113)
    assert (usage.cost_ns, usage.peak_bytes, usage.peak_step) == (170, 119, 4)


def test_codec_by_hand() -> None:
    usage = simulate(chain(), (0, 1, 2, 6, 3, 7, 4, 5))
    # pack: x a b e | turn: x b t e | unpack: x t e a | b_backward: x t a g
    assert usage.bytes_at == (104, 118, 114, 115, 108, 114, 116, 113)
    assert usage.cost_ns == 166


def test_a_value_written_twice_without_a_read_between_is_not_held_between() -> None:
    usage = simulate(chain(), (0, 1, 2, 1, 3, 4, 5))
    # the second a is the one that b_backward reads
    assert usage.bytes_at == (104, 118, 114, 120, 115, 116, 113)


def in_place() -> Problem:
    """x(4) r(4) over x; turn t(4); g(4) reads t; h(4) over g, and reads r; x's gradient h stays. `again` is r's op."""
    ops = (
        Op("x", (), (0,), 10),
        Op("r", (0,), (1,), 20, takes_over=0),
        Op("turn", (1,), (2,), 0, repeatable=False),
        Op("g", (2,), (3,), 40),
        Op("h", (1, 3), (4,), 50, takes_over=3),
    )
    return Problem("in place", ops, (0, 1, 2, 3, 4), 2, (4,) * 5, tuple("xrtgh"), frozenset({4}), 100, 0)


@pytest.mark.parametrize(
    ("schedule", "expected", "taken"),
    [
        # x | r over x | r t | r t g | r h over g
        ((0, 1, 2, 3, 4), (104, 104, 108, 112, 108), {1: 0, 4: 3}),
        # x is read again after the turn: r cannot have its memory, nor may the second r, for x crossed the turn
        ((0, 1, 2, 1, 3, 4), (104, 108, 112, 112, 112, 108), {5: 3}),
        # x and r come back after the turn: the second r may
        ((0, 1, 2, 0, 1, 3, 4), (104, 104, 108, 108, 108, 112, 108), {1: 0, 4: 0, 6: 3}),
    ],
)
def test_take_overs_by_hand(schedule: tuple[int, ...], expected: tuple[int, ...], taken: dict[int, int]) -> None:
    problem = in_place()
    assert take_overs(problem.ops, schedule, 2, problem.keep) == taken
    assert simulate(problem, schedule).bytes_at == expected
    apart = problem.out_of_place()
    assert simulate(apart, schedule).cost_ns == simulate(problem, schedule).cost_ns
    assert sum(simulate(apart, schedule).bytes_at) == sum(expected) + 4 * len(taken)


def test_live_values_are_listed_largest_first() -> None:
    assert live_at(chain(), (0, 1, 2, 3, 4, 5), 3) == (1, 0, 2, 3)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ((0, 2, 1, 3, 4, 5), "reads value 1 before it is written"),
        ((0, 1, 2, 4, 5), "turn"),
        ((0, 1, 2, 3, 3, 4, 5), "exactly once"),
        ((0, 1, 2, 3, 4), "must be live at the end"),
        ((0, 1, 2, 3, 7, 4, 5), "reads value 6 before it is written"),
        ((0, 1, 2, 99), "no op 99"),
        ((), "exactly once"),
    ],
)
def test_invalid_schedules_are_refused_by_name(schedule: tuple[int, ...], words: str) -> None:
    with pytest.raises(InvalidSchedule, match=words):
        simulate(chain(), schedule)
    assert not fits(chain().with_budget(10**9), schedule)


def brute(problem: Problem, schedule: tuple[int, ...]) -> tuple[int, int] | None:
    """Cost and peak by asking, for every step and value, whether a read comes before the next write."""
    ops, n = problem.ops, len(schedule)
    once = [o for o in problem.program if not ops[o].repeatable]
    if [o for o in schedule if not ops[o].repeatable] != once:
        return None
    peak = problem.fixed_bytes
    for t, o in enumerate(schedule):
        if any(all(v not in ops[s].writes for s in schedule[:t]) for v in ops[o].reads):
            return None
        used = problem.fixed_bytes + ops[o].workspace_bytes
        for v, size in enumerate(problem.value_bytes):
            used += size * (held(problem, schedule, v, t) + (v in ops[o].writes))
        used -= taken_bytes(problem, schedule, t)
        peak = max(peak, used)
    if any(all(v not in ops[s].writes for s in schedule) for v in problem.keep):
        return None
    assert n
    return sum(ops[o].cost_ns for o in schedule), peak


def held(problem: Problem, schedule: tuple[int, ...], v: int, t: int) -> bool:
    """Whether a version of v written before step t is still needed at t or later."""
    if all(v not in problem.ops[s].writes for s in schedule[:t]):
        return False
    for s in schedule[t:]:
        if v in problem.ops[s].reads:
            return True
        if v in problem.ops[s].writes:
            return False
    return v in problem.keep


def taken_bytes(problem: Problem, schedule: tuple[int, ...], t: int) -> int:
    """Bytes that step t writes over: of a value it may take, not needed later, and not from across the turn."""
    v = problem.ops[schedule[t]].takes_over
    if v is None or held(problem, schedule, v, t + 1):
        return 0
    written = max(s for s in range(t) if v in problem.ops[schedule[s]].writes)
    crossed = written < schedule.index(problem.program[problem.turn]) < t
    return 0 if crossed else problem.value_bytes[v]


@pytest.mark.parametrize("seed", range(60))
def test_sabotage_is_refused_or_priced(seed: int) -> None:
    """Drop, swap or double a step: the checker agrees with brute force on validity, cost and peak."""
    problem = random_problem(seed, 6, budget=0.4)
    schedule = solve(problem, "ilp", Limits(seconds=5)).schedule or problem.program
    rng = random.Random(seed)
    for _ in range(12):
        broken = list(schedule)
        i, j = rng.randrange(len(broken)), rng.randrange(len(broken))
        match rng.randrange(3):
            case 0:
                del broken[i]
            case 1:
                broken[i], broken[j] = broken[j], broken[i]
            case _:
                broken.insert(i, broken[j])
        expected = brute(problem, tuple(broken))
        try:
            usage = simulate(problem, tuple(broken))
        except InvalidSchedule:
            assert expected is None
        else:
            assert (usage.cost_ns, usage.peak_bytes) == expected


def test_the_door_refuses_a_solver_that_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    import solvers

    def liar(problem: Problem, limits: Limits) -> Solution:
        return Solution(Status.FEASIBLE, problem.program, 0, "any plan", "liar")

    monkeypatch.setitem(solvers.SOLVERS, "liar", liar)
    assert solve(chain().with_budget(118), "liar").schedule is not None
    with pytest.raises(SolverBroken, match="118 bytes for a budget of 117"):
        solve(chain().with_budget(117), "liar")
