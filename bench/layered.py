"""Random layered graphs as Problems, in the manner of the experiments of Bartan et al. 2023 (Moccasin, ICML).

There: 100 to 1,000 nodes in layers, edges mostly to the next layers, integer sizes and durations. Here such a graph
is the forward half; each node's backward op reads its gradient, its inputs and its output, as a training step does.
"""

from __future__ import annotations

import random

from solvers import Op, Problem

SIZES = (100, 250, 500, 1000)
MEGABYTE = 1 << 20
SKIP = 0.2  # of the second and later inputs come from any earlier layer


def layered(nodes: int, seed: int) -> Problem:
    """Return a problem of `nodes` / 2 forward ops in layers of one to six, and a backward op for each edge."""
    rng = random.Random(seed * 1000 + nodes)
    forward = nodes // 2
    inputs = _edges(rng, forward)
    size = [rng.randint(1, 20) * MEGABYTE for _ in range(forward)]
    cost = [rng.randint(1, 20) * 100_000 for _ in range(forward)]
    names = [f"v{i}" for i in range(forward)]
    ops = [Op(f"f{i}", tuple(inputs[i]), (i,), cost[i]) for i in range(forward)]
    tangent = forward
    last = forward - 1
    ops.append(Op("turn", (last,), (tangent,), 0, repeatable=False))
    value_bytes, grads = [*size, size[last]], {last: tangent}
    names.append("tangent")
    for i in reversed(range(forward)):
        if i not in grads:
            continue
        for j in inputs[i]:
            made = len(value_bytes)
            value_bytes.append(size[j])
            names.append(f"g{i}_{j}")
            ops.append(Op(f"b{i}_{j}", (grads[i], j, i), (made,), cost[i]))
            if j in grads:
                total = len(value_bytes)
                value_bytes.append(size[j])
                names.append(f"s{i}_{j}")
                ops.append(Op(f"a{i}_{j}", (grads[j], made), (total,), 10_000, takes_over=grads[j]))
                made = total
            grads[j] = made
    weight = len(value_bytes)
    value_bytes.append(MEGABYTE)
    names.append("weight_gradient")
    ops.append(Op("end", (grads[0],), (weight,), 0, repeatable=False))
    order = tuple(range(len(ops)))
    problem = Problem(
        f"layered{nodes}", tuple(ops), order, forward, tuple(value_bytes), tuple(names), frozenset({weight}), 0, 0
    )
    problem.verify()
    return problem


def _edges(rng: random.Random, forward: int) -> list[list[int]]:
    """Return each node's inputs: one or two of the layer before, some from further back; node 0 has none."""
    layers: list[list[int]] = [[0]]
    inputs: list[list[int]] = [[]]
    while len(inputs) < forward:
        layer = []
        for _ in range(min(rng.randint(1, 6), forward - len(inputs))):
            before = layers[-1]
            chosen = {rng.choice(before)}
            if rng.random() < 0.6:
                chosen.add(rng.randrange(len(inputs) - len(layer)) if rng.random() < SKIP else rng.choice(before))
            layer.append(len(inputs))
            inputs.append(sorted(chosen))
        layers.append(layer)
    unread = set(range(forward - 1)) - {j for some in inputs for j in some}
    inputs[-1] = sorted(unread | set(inputs[-1]))  # the last node gathers what nobody reads: the loss
    return inputs
