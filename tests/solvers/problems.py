"""Random problems shaped as joint graphs are: chains, skips, masks, statistics, codecs, workspace."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import combinations

from hypothesis import strategies as st

from solvers.problem import Kind, Op, Problem

LAYERS = ("linear", "relu", "gelu", "dropout", "norm", "pool", "cast", "skip", "opaque")


@dataclass
class Builder:
    """Grows a forward pass, then `close` writes the turn and the backward pass."""

    rng: random.Random
    ops: list[Op] = field(default_factory=list)
    program: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    keep: set[int] = field(default_factory=set)
    layers: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    unit: int = 1

    def value(self, name: str, size: int) -> int:
        self.sizes.append(size * self.unit)
        self.names.append(f"{name}{len(self.names)}")
        return len(self.sizes) - 1

    def size(self) -> int:
        return self.rng.randint(1, 8)

    def op(self, name: str, reads: tuple[int, ...], writes: tuple[int, ...], **more: object) -> int:
        optional = more.get("instead_of") is not None or more.get("kind", Kind.COMPUTE) is not Kind.COMPUTE
        cost = self.rng.randint(1, 9)
        scratch = self.rng.choice((0, 0, self.rng.randint(1, 6) * self.unit))
        made = Op(f"{name}{len(self.ops)}", reads, writes, cost, scratch)
        self.ops.append(replace(made, **more))  # type: ignore[arg-type]
        if not optional:
            self.program.append(len(self.ops) - 1)
        return len(self.ops) - 1

    def layer(self, kind: str, x: int, others: list[int]) -> int:
        """Add one layer on value x; return its output."""
        size = self.rng.choice((self.size(), self.sizes[x] // self.unit))
        if kind == "dropout":
            mask, y = self.value("mask", size), self.value("y", size)
            p = self.op("dropout", (x,), (y, mask), repeatable=False)
            self.op("reapply", (x, mask), (y,), instead_of=p)
            if self.rng.random() < 0.7:
                self.codec(mask)
            self.layers.append((kind, (x,), (y, mask)))
        elif kind == "norm":
            # A large output beside a tiny statistic, both written again by the variant, is a case of its own.
            size *= self.rng.choice((1, 6))
            stat, y = self.value("stat", 1), self.value("y", size)
            p = self.op("norm", (x,), (y, stat), repeatable=False)
            self.op("renorm", (x,), (y, stat) if self.rng.random() < 0.6 else (y,), instead_of=p)
            self.layers.append((kind, (x,), (y, stat)))
        elif kind == "pool":
            index, y = self.value("index", size), self.value("y", max(1, size // 2))
            self.op("pool", (x,), (y, index))
            if self.rng.random() < 0.7:
                self.codec(index)
            self.layers.append((kind, (x,), (y, index)))
        else:
            y = self.value("y", size)
            reads = (x, self.rng.choice(others)) if kind == "skip" else (x,)
            self.op(kind, tuple(dict.fromkeys(reads)), (y,), repeatable=kind != "opaque")
            self.layers.append((kind, tuple(dict.fromkeys(reads)), (y,)))
        return self.layers[-1][2][0]

    def codec(self, v: int) -> None:
        """A codec of the decode kind for value v."""
        e = self.value("bits", max(1, self.sizes[v] // self.unit // 4))
        self.op("encode", (v,), (e,), kind=Kind.ENCODE)
        self.op("decode", (e,), (v,), kind=Kind.DECODE)

    def close(self, y: int, name: str) -> Problem:
        """Add the turn and the backward pass."""
        grads: dict[int, list[int]] = {y: [self.value("tangent", self.size())]}
        turn = len(self.program)
        self.op("turn", (y,), (grads[y][0],), repeatable=False)
        for kind, reads, writes in reversed(self.layers):
            grad = self.total(grads, writes[0])
            if grad is not None:
                self.backward(kind, reads, writes, grad, grads)
        peak = self.value("done", 1)
        self.op("done", (), (peak,), repeatable=False)
        self.keep.add(peak)
        fixed = self.rng.randint(0, 3) * self.unit
        self.take_over(turn)
        return Problem(
            name,
            tuple(self.ops),
            tuple(self.program),
            turn,
            tuple(self.sizes),
            tuple(self.names),
            frozenset(self.keep),
            fixed,
            0,
        )

    def take_over(self, turn: int) -> None:
        """Let most ops that could write over an operand do so, their alternatives as they like."""
        write = {v: t for t, o in enumerate(self.program) for v in self.ops[o].writes}
        last = {(v, t > turn): t for t, o in enumerate(self.program) for v in self.ops[o].reads}
        for i, op in enumerate(self.ops):
            o = i if op.instead_of is None else op.instead_of
            if o not in self.program or self.program.index(o) == turn or len(op.writes) != 1:
                continue
            t = self.program.index(o)
            same = [v for v in op.reads if v in write and self.sizes[v] == self.sizes[op.writes[0]]]
            same = [v for v in same if v not in (*self.keep, *op.writes) and (write[v] >= turn) == (t > turn)]
            free = [v for v in same if last.get((v, t > turn)) == t]
            if free and op.repeatable and self.rng.random() < 0.8:
                self.ops[i] = replace(op, takes_over=self.rng.choice(free))

    def total(self, grads: dict[int, list[int]], v: int) -> int | None:
        """The gradient of v, its parts added up."""
        parts = grads.get(v, [])
        while len(parts) > 1:
            a, b = parts.pop(), parts.pop()
            parts.append(self.value("sum", self.sizes[a] // self.unit))
            self.op("add", (a, b), (parts[-1],))
        return parts[0] if parts else None

    def backward(
        self,
        kind: str,
        reads: tuple[int, ...],
        writes: tuple[int, ...],
        grad: int,
        grads: dict[int, list[int]],
    ) -> None:
        saved = {"relu": writes[:1], "dropout": writes[1:], "pool": writes[1:], "cast": (), "skip": ()}
        saved_values = saved.get(kind, (*reads, *writes[1:]))
        for x in reads:
            gx = self.value("g", self.sizes[x] // self.unit)
            out = [gx]
            if kind in ("linear", "norm"):
                out.append(self.value("gw", 1))
                self.keep.add(out[-1])
            q = self.op(f"{kind}_backward", (grad, *saved_values), tuple(out))
            if kind == "relu" and self.rng.random() < 0.7:
                e = self.value("bits", 1)
                self.op("mask", writes[:1], (e,), kind=Kind.ENCODE)
                self.op("masked_backward", (grad, e), tuple(out), instead_of=q)
            grads.setdefault(x, []).append(gx)


def random_problem(seed: int, layers: int, unit: int = 1, budget: float | None = None) -> Problem:
    """A random problem; `budget` is a share of the way from working set to keep-all."""
    rng = random.Random(seed)
    builder = Builder(rng, unit=unit)
    x = builder.value("x", builder.size())
    builder.op("embed", (), (x,), repeatable=rng.random() < 0.5)
    outputs = [x]
    for _ in range(layers):
        outputs.append(builder.layer(rng.choice(LAYERS), outputs[-1], outputs))
    problem = builder.close(outputs[-1], f"random-{seed}-{layers}")
    problem.verify()
    return at_share(problem, rng.choice((0.1, 0.3, 0.5, 0.7, 0.9)) if budget is None else budget)


def at_share(problem: Problem, share: float) -> Problem:
    """The problem with its budget a share of the way from the working set to the keep-all peak."""
    from solvers import working_set
    from solvers.simulate import simulate

    top = simulate(problem, problem.program).peak_bytes
    low = working_set(problem).peak_bytes
    return problem.with_budget(low + round(share * (top - low)))


def problems(layers: int = 8) -> st.SearchStrategy[Problem]:
    """Hypothesis strategy over `random_problem`; shrinks to fewer layers and smaller seeds."""
    return st.builds(random_problem, st.integers(0, 100_000), st.integers(1, layers))


def noisy_problem(seed: int, layers: int, joint: bool = False) -> Problem:
    """A random problem with two lossy widths for some values, all of whose backward readers can read the codes.

    `joint`: backward ops read several values, and most can run from several codes.
    """
    problem, rng = random_problem(seed, layers), random.Random(seed)
    ops, sizes, names = list(problem.ops), list(problem.value_bytes), list(problem.value_names)
    ops = several_readers(ops, problem, rng) if joint else ops
    late = problem.program[problem.turn + 1 :]
    for v in {v for o in problem.program[: problem.turn] for v in ops[o].writes}:
        readers = [o for o in late if v in ops[o].reads]
        if not readers or v in problem.keep or rng.random() < 0.4 or not all(ops[o].repeatable for o in readers):
            continue
        for width in (2, 4):
            code = len(sizes)
            sizes.append(max(1, sizes[v] // width))
            names.append(f"{names[v]}q{width}")
            noise = rng.randint(1, 9) * width**2
            ops.append(Op(f"q{code}", (v,), (code,), rng.randint(1, 5), kind=Kind.ENCODE, noise_ppb=noise))
            for o in readers:
                reads = (*(r for r in ops[o].reads if r != v), code)
                made = Op(f"r{len(ops)}", reads, ops[o].writes, ops[o].cost_ns + rng.randint(0, 4), instead_of=o)
                ops.append(replace(made, workspace_bytes=rng.randint(0, sizes[v])))
    if joint:
        add_joint(ops, rng)
    made = replace(problem, ops=tuple(ops), value_bytes=tuple(sizes), value_names=tuple(names))
    made.verify()
    return at_share(replace(made, noise_limit_ppb=rng.choice((0, 5, 20, 60, 10_000))), rng.choice((0.0, 0.2, 0.5)))


def several_readers(ops: list[Op], problem: Problem, rng: random.Random) -> list[Op]:
    """Let some backward ops read a second forward value, which nobody takes over."""
    forward = [v for o in problem.program[: problem.turn] for v in ops[o].writes]
    taken = {op.takes_over for op in ops}
    free = [v for v in forward if v not in taken and v not in problem.keep]
    for o in problem.program[problem.turn + 1 :]:
        if free and ops[o].reads and ops[o].repeatable and rng.random() < 0.5:
            own = all(op.instead_of != o for op in ops)
            reads = tuple(dict.fromkeys((*ops[o].reads, rng.choice(free))))
            ops[o] = replace(ops[o], reads=reads) if own else ops[o]
    return ops


def add_joint(ops: list[Op], rng: random.Random) -> None:
    """Add to most ops with alternatives from several codes what runs from all of them: priced as their sum, or not."""
    encoder = {v: op for op in ops if op.kind is Kind.ENCODE and op.noise_ppb for v in op.writes}
    own: dict[int, list[int]] = {}
    for i, op in enumerate(ops):
        if op.instead_of is not None and any(v in encoder for v in op.reads):
            own.setdefault(op.instead_of, []).append(i)
    for q, alternatives in own.items():
        reads = set(ops[q].reads)
        for i, j in combinations(alternatives, 2):
            gone = [reads - set(ops[o].reads) for o in (i, j)]
            if gone[0] & gone[1] or rng.random() < 0.3:
                continue
            codes = tuple(v for o in (i, j) for v in ops[o].reads if v not in reads)
            kept = tuple(v for v in ops[q].reads if v not in gone[0] | gone[1])
            cost = ops[i].cost_ns + ops[j].cost_ns - ops[q].cost_ns + (1 if rng.random() < 0.1 else 0)
            scratch = scratch_bytes_of(ops[i], ops[j], ops[q])
            scratch = rng.choice((scratch, scratch // 2)) if scratch > 0 else scratch
            if scratch >= 0:
                ops.append(Op(f"joint{len(ops)}", (*kept, *codes), ops[q].writes, cost, scratch, instead_of=q))


def scratch_bytes_of(a: Op, b: Op, own: Op) -> int:
    """The workspace of what is both; -1 where the op writes over an operand, which its alternatives do not."""
    return -1 if own.takes_over is not None else a.workspace_bytes + b.workspace_bytes - own.workspace_bytes
