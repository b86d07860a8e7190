"""unplanned: what plain PyTorch does with the same graph. Percentages are of its peak, and plans say what they save.

It runs each half in the order in which it was traced, overwrites nothing, keeps the inputs that its backwards ask, each
node of autograd to its last op, and dropout's masks in the numbers' own dtype (torch 2.13 on CPU; CUDA's fused kernel
writes booleans).
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import replace

import torch
from torch import fx

from graphplan.graph import Graph
from graphplan.instructions import Instructions
from graphplan.lower import values_of
from solvers import Problem, simulate

aten = torch.ops.aten


def unplanned_peak(problem: Problem, graph: Graph, instructions: Instructions) -> int:
    """Return the peak in bytes of a step without a plan; not below that of the problem's own program."""
    plain = with_wide_masks(asking_inputs(problem.out_of_place(), graph, instructions), graph, instructions)
    traced = traced_program(graph, instructions)
    plain = replace(plain, program=traced)
    held = _holding_by_node(plain, graph, instructions)
    return max(simulate(held, traced).peak_bytes, simulate(problem.out_of_place(), problem.program).peak_bytes)


def asking_inputs(problem: Problem, graph: Graph, instructions: Instructions) -> Problem:
    """Return `problem` with backwards reading inputs, as autograd's do, where the graph lets them ask results."""
    index = {s: v for v, s in enumerate(values_of(graph, instructions))}
    ops = list(problem.ops)
    for o, item in enumerate(instructions.items):
        node = graph.ops[item.op].node if item.kind == "op" and item.op is not None else None
        if node is None or "graphplan_asked" not in node.meta:
            continue
        names = (node.meta["graphplan_asked"] if i == 1 else n.name for i, n in enumerate(node.all_input_nodes))
        reads = dict.fromkeys(index[s] for name in names for s in graph.storages_of[name] if s in index)
        ops[o] = replace(ops[o], reads=tuple(reads))
    return replace(problem, ops=tuple(ops))


def _holding_by_node(problem: Problem, graph: Graph, instructions: Instructions) -> Problem:
    """Return `problem` with all that the ops of one node of autograd read held to that node's last op."""
    ops, position = list(problem.ops), {item.op: o for o, item in enumerate(instructions.items) if item.kind == "op"}
    backward = [graph.ops[t] for t in graph.traced if graph.ops[t].backward]
    for _, run in itertools.groupby(backward, key=lambda op: _node_of(op.node) or op.name):
        node = [position[op.id] for op in run]
        reads = dict.fromkeys(v for o in node for v in problem.ops[o].reads)
        ops[node[-1]] = replace(ops[node[-1]], reads=tuple(reads))
    return replace(problem, ops=tuple(ops))


def _node_of(node: fx.Node) -> int | None:
    """Return the number of the autograd node that a backward op was traced in; sums of gradients stand outside."""
    return None if node.meta.get("is_gradient_acc") else node.meta.get("seq_nr")


def with_wide_masks(problem: Problem, graph: Graph, instructions: Instructions) -> Problem:
    """Return `problem` with dropout's masks in the dtype of what they mask, as eager mode keeps them on a CPU."""
    index = {s: v for v, s in enumerate(values_of(graph, instructions))}
    sizes = list(problem.value_bytes)
    for op in graph.ops:
        if op.node.target is not aten.native_dropout.default:
            continue
        dropped = op.node.all_input_nodes[0].meta["val"]
        for mask in (u for u in op.node.users if u.target is operator.getitem and u.args[1] == 1):
            for v in (index[s] for s in graph.storages_of[mask.name] if s in index):
                sizes[v] *= dropped.element_size() if dropped.device.type == "cpu" else 1  # booleans take a byte
    return replace(problem, value_bytes=tuple(sizes))


def traced_program(graph: Graph, instructions: Instructions) -> tuple[int, ...]:
    """Return the program as plain PyTorch runs it: every op of a half where it was traced."""
    place: dict[int | None, int] = {op: t for t, op in enumerate(graph.traced)}
    ops = [item.op for item in instructions.items]
    found: list[int] = []
    for half, run in itertools.groupby(instructions.program, key=lambda p: ops[p] is not None):
        part = list(run)
        found.extend(sorted(part, key=lambda p: place[ops[p]]) if half else part)
    return tuple(found)
