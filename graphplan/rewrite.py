"""rewrite: Graph + steps -> fx GraphModules. One fx node per step; views are evaluated again where they are read."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.graph import _BoxedCodeGen

from graphplan.errors import PlanMismatch
from graphplan.graph import Graph, GraphOp
from graphplan.in_place import written_over
from graphplan.instructions import END, TURN, Instruction, Instructions
from solvers import take_overs

KEY = "step_key"


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A planned step: the joint graph to read, and its two halves to run (boxed: they empty their argument list).

    forward: primals (then the key, if `keyed`) -> forward outputs, then what it saves; backward: saved, then tangents
    -> gradients.
    """

    joint: fx.GraphModule
    forward: fx.GraphModule
    backward: fx.GraphModule
    outputs: int  # how many of the forward half's results are the model's
    keyed: bool = False  # the forward half takes the key of lossy encodes after the primals


def rewrite(graph: Graph, instructions: Instructions, steps: Sequence[str], *, in_place: bool = True) -> Rewritten:
    """Return the program that runs `steps` (names of instructions, in order).

    With `in_place=False` no op writes over an operand: the same numbers, in more memory than was planned.

    Raises:
        PlanMismatch: a step that this graph does not offer, or that reads a value which is not live.
    """
    joint, turn, outputs, writer = _write(graph, instructions, steps, in_place)
    forward, backward = _halves(graph, joint, turn, outputs, writer.made_views)
    return Rewritten(joint, forward, backward, outputs, writer.key_node is not None)


def rewrite_whole(
    graph: Graph, instructions: Instructions, steps: Sequence[str], *, in_place: bool = True
) -> fx.GraphModule:
    """Return the program of a graph that needs nothing from outside between its halves, as one boxed module.

    primals -> forward outputs, then the gradients that the graph returns. Arguments and errors as in `rewrite`.
    """
    joint, _, _, _ = _write(graph, instructions, steps, in_place)
    results = joint.graph.output_node().args[0]
    joint.graph.output_node().args = (tuple(n for n in results if n is not None),)  # type: ignore[union-attr]
    return _boxed(joint, joint.graph, "")


def _write(
    graph: Graph, instructions: Instructions, steps: Sequence[str], in_place: bool
) -> tuple[fx.GraphModule, str, int, _Writer]:
    """Return (the joint module, the last node of the turn, how many results are the model's, what wrote it)."""
    index = instructions.by_name()
    unknown = next((s for s in steps if s not in index), None)
    if unknown is not None:
        raise PlanMismatch(f"the plan names op {unknown!r}, which graph {graph.name} does not have")
    writer = _Writer(graph)
    nodes = graph.nodes
    results: tuple[Any, ...] = ()
    turn: fx.Node | None = None
    schedule = tuple(index[step] for step in steps)
    turn_id = instructions.program[instructions.turn]
    taken = take_overs(instructions.items, schedule, turn_id, graph.returned) if in_place else {}
    for t, i in enumerate(schedule):
        item = instructions.items[i]
        writer.begin(item, taken.get(t))
        item.emit(writer)
        if item.name == TURN:
            results = tuple(writer.load(nodes[n]) for n in graph.forward_outputs)
            turn = writer.last()
        elif item.name == END:
            gradients = tuple(writer.load(nodes[n]) if n is not None else None for n in graph.gradients)
            writer.graph.output((*results, *gradients))
    if turn is None or not writer.finished():
        raise PlanMismatch(f"the plan does not run {TURN!r} and {END!r}")
    writer.graph.lint()
    joint = fx.GraphModule(graph.module, writer.graph, f"{graph.name}Step")
    return joint, turn.name, len(results), writer


class _Writer:
    """The Emitter that writes the joint graph; `env` is the present copy of each captured node's value."""

    def __init__(self, graph: Graph) -> None:
        self.source = graph
        self.graph = fx.Graph()
        self.step = ""
        self.over: tuple[GraphOp, int] | None = None  # what the present step writes over
        self.env: dict[fx.Node, fx.Node] = {}
        self.views: dict[int, set[fx.Node]] = defaultdict(set)
        self.made_views: set[str] = set()
        self.encoded: dict[int, fx.Node] = {}
        self.key_node: fx.Node | None = None
        self.updated: set[int] = set()  # storages of the parameters that have their new values
        self.used: set[str] = set()
        self.op_names = frozenset(op.name for op in graph.ops)
        for node in graph.module.graph.find_nodes(op="placeholder"):
            self.env[node] = self._create("placeholder", node.name, (), {}, node.name, node)

    def begin(self, item: Instruction, taken: int | None) -> None:
        self.step = item.name
        self.over = None if taken is None or item.op is None else (self.source.ops[item.op], taken)

    @property
    def takes_over(self) -> bool:
        return self.over is not None

    def finished(self) -> bool:
        return bool(self.last().op == "output")

    def last(self) -> fx.Node:
        nodes: list[fx.Node] = list(self.graph.nodes)
        return nodes[-1]

    def load(self, node: fx.Node) -> fx.Node:
        if self.updated and not self.updated.isdisjoint(self.source.storages_of[node.name]):
            raise PlanMismatch(f"step {self.step!r} reads parameter {node.name!r} after its update")
        if node in self.env:
            return self.env[node]
        if node.op == "get_attr":
            self.env[node] = self._create("get_attr", node.target, (), {}, node.name, node)
            return self.env[node]
        storages = self.source.storages_of[node.name]
        if node.name in self.op_names or self._is_item_of_op(node):
            raise PlanMismatch(f"step {self.step!r} reads {node.name!r}, which is not live there")
        view = self.copy(node, node.name)
        self.env[node] = view
        self.made_views.add(view.name)
        for s in storages:
            self.views[s].add(node)
        return view

    def load_encoded(self, storage: int) -> fx.Node:
        if storage not in self.encoded:
            raise PlanMismatch(f"step {self.step!r} reads an encoding that was not made")
        return self.encoded[storage]

    def call(
        self, target: Callable[..., Any], args: tuple[Any, ...], name: str, kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        return self._create("call_function", target, args, kwargs or {}, name, None)

    def key(self) -> fx.Node:
        if self.key_node is None:
            first = next(n for n in self.graph.nodes if n.op != "placeholder")
            with self.graph.inserting_before(first):
                self.key_node = self._create("placeholder", KEY, (), {}, KEY, None)
        return self.key_node

    def copy(self, node: fx.Node, name: str) -> fx.Node:
        args = fx.map_arg(node.args, self.load)
        kwargs = fx.map_arg(node.kwargs, self.load)
        target = node.target
        if self.over is not None and self.over[0].node is node:
            target, args, kwargs = written_over(self.source, *self.over, args, kwargs)
        if "graphplan_update" in node.meta:
            self.updated.update(self.source.storages_of[node.all_input_nodes[0].name])
        return self._create(node.op, target, args, kwargs, name, node)

    def store(self, node: fx.Node, value: fx.Node) -> None:
        for s in self.source.storages_of[node.name]:
            for view in self.views.pop(s, set()):
                self.env.pop(view, None)  # a view of the old copy must be taken again
        if "val" in node.meta:
            value.meta.setdefault("val", node.meta["val"])
        self.env[node] = value

    def store_encoded(self, storage: int, value: fx.Node) -> None:
        self.encoded[storage] = value

    def _is_item_of_op(self, node: fx.Node) -> bool:
        parent = node.args[0] if node.target is operator.getitem else None
        return isinstance(parent, fx.Node) and parent.name in self.op_names

    def _create(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str,
        like: fx.Node | None,
    ) -> fx.Node:
        shown = f"{name}__recompute" if name in self.used else name
        self.used.add(name)
        node = self.graph.create_node(op, target, args, kwargs, shown)
        if like is not None:
            node.meta = dict(like.meta)
        return node


def _halves(
    graph: Graph, joint: fx.GraphModule, turn: str, outputs: int, views: set[str]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut the joint graph after node `turn`; what the backward reads from before it is saved.

    A view is not saved: its base is, and the backward takes the view again.
    """
    nodes = list(joint.graph.nodes)
    tangents = {t for t in graph.tangents if t is not None}
    cut = next(i for i, n in enumerate(nodes) if n.name == turn) + 1
    early = [n for n in nodes[:cut] if n.name not in tangents]
    late = [n for n in nodes[cut:] if n.op not in ("output", "placeholder")]
    results = joint.graph.output_node().args[0]
    assert isinstance(results, tuple)
    wanted = {a for n in late for a in n.all_input_nodes}
    wanted.update(n for n in results[outputs:] if isinstance(n, fx.Node))
    again: list[fx.Node] = []
    for node in reversed(early):
        if node in wanted and (node.op == "get_attr" or node.name in views):
            again.insert(0, node)
            wanted.update(node.all_input_nodes)
    saved = [n for n in early if n in wanted and n not in again]

    env: dict[fx.Node, fx.Node] = {}
    forward = fx.Graph()
    for node in early:
        env[node] = forward.node_copy(node, env.__getitem__)
    forward.output(tuple(env[n] for n in (*results[:outputs], *saved)))

    env = {}
    backward = fx.Graph()
    for node in saved:
        env[node] = backward.placeholder(f"saved_{node.name}")
    placed = {n.name: n for n in nodes[:cut]}
    for name in graph.tangents:  # in the order of the outputs, as they are given: in the graph those of bases come last
        if name is not None:
            env[placed[name]] = backward.placeholder(name)
    for node in (*again, *late):
        env[node] = backward.node_copy(node, env.__getitem__)
    backward.output(tuple(env[n] if isinstance(n, fx.Node) else None for n in results[outputs:]))
    return _boxed(joint, forward, "Forward"), _boxed(joint, backward, "Backward")


def _boxed(root: fx.GraphModule, graph: fx.Graph, half: str) -> fx.GraphModule:
    """Return a module whose `forward(args: list)` empties `args`, so that every value is freed at its last use."""
    graph.set_codegen(_BoxedCodeGen())
    graph.lint()
    return fx.GraphModule(root, graph, f"{type(root).__name__}{half}")
