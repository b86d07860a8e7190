"""Graph: the joint forward + backward fx graph as ops over storages.

An fx view or `getitem` is not an op: it is another name of its base's storage. A storage is the unit of memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from types import FunctionType
from typing import Any

import networkx as nx
import torch
from torch import fx

from graphplan.errors import GraphplanError
from graphplan.units import format_bytes


class StorageKind(Enum):
    """Why a storage exists. The first six are in use for the whole step and are never planned."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    CONSTANT = "constant"
    STATE = "state"  # what the optimizer keeps for one parameter
    SETTINGS = "settings"  # of one parameter group of the optimizer: no tensors
    TANGENT = "tangent"  # the loss's gradient for one output, written between forward and backward
    ACTIVATION = "activation"  # written in the forward, read in the backward
    FORWARD = "forward"  # written and read in the forward only
    BACKWARD = "backward"  # written in the backward
    OUTPUT = "output"  # returned by the model: the caller holds it to the end of the step
    GRADIENT = "gradient"  # returned by the backward

    @property
    def fixed(self) -> bool:
        """Whether the storage is in use during the whole step."""
        return self in _FIXED


_FIXED = frozenset(list(StorageKind)[:6])


@dataclass(frozen=True, slots=True)
class Storage:
    """`nbytes` of memory, named after the fx node that first holds it."""

    id: int
    name: str
    nbytes: int
    kind: StorageKind


@dataclass(frozen=True, slots=True)
class GraphOp:
    """One fx node that does work (not a view): reads and writes storages."""

    id: int
    node: fx.Node = field(repr=False, compare=False)
    name: str
    target: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    backward: bool
    random: bool  # draws from the RNG stream: runs exactly once
    repeatable: bool  # pure, and reads nothing that the step mutates


@dataclass(frozen=True, slots=True)
class Primal:
    """Where one graph input comes from.

    A parameter, a buffer or a parameter's optimizer state by its path; the i-th input tensor; a constant; the
    i-th group of the optimizer's settings.
    """

    kind: StorageKind
    path: str
    index: int = -1
    value: torch.Tensor | None = field(default=None, repr=False, compare=False)
    node: str = ""
    mutated: bool = False
    hooked: bool = False  # autograd calls the user's functions with its gradient


@dataclass(frozen=True, slots=True)
class Output:
    """How one tensor that the model returns is made at run time.

    `source` is "forward" (the `index`-th tensor of the forward half) or "primal" (the `index`-th graph input).
    `view` is (size, stride, offset from the source's) when the output is a view of that source, not the source itself.
    """

    source: str
    index: int
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None = None
    detached: bool = False  # the model cut it from the autograd graph


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured training step. `verify()` checks it, `str()` prints it, `to_networkx()` exposes it."""

    module: fx.GraphModule
    name: str
    primals: tuple[Primal, ...]
    outputs: tuple[Output, ...]
    forward_outputs: tuple[str, ...]  # node names; forward half's return values
    tangents: tuple[str | None, ...]  # for each forward output: its tangent placeholder, None if not differentiable
    mutations: tuple[tuple[int, str], ...]  # (primal index, node with its new value)
    gradients: tuple[str | None, ...]  # for each primal: the node of its gradient
    storages: tuple[Storage, ...]
    ops: tuple[GraphOp, ...]
    storages_of: dict[str, tuple[int, ...]]  # node name -> storages that its value touches
    fingerprint: str
    traced: tuple[int, ...] = ()  # the ops' ids in the order in which they were traced

    @property
    def nodes(self) -> dict[str, fx.Node]:
        """The fx nodes by name."""
        return {n.name: n for n in self.module.graph.nodes}

    @property
    def returned(self) -> frozenset[int]:
        """Storages of the model's outputs and of the gradients: they stay to the end."""
        results = (*self.forward_outputs, *(n for n in self.gradients if n is not None))
        return frozenset(s for n in results for s in self.storages_of[n])

    @property
    def update(self) -> str:
        """The name of the function that updates parameters inside the step; empty where the caller does it."""
        targets = (op.node.target for op in self.ops if "graphplan_update" in op.node.meta)
        return str(getattr(next(targets, None), "__name__", "")).removesuffix("_of_product")

    @property
    def fixed_bytes(self) -> int:
        """Bytes of parameters, buffers, inputs, constants and the optimizer's state."""
        return sum(s.nbytes for s in self.storages if s.kind.fixed)

    def to_networkx(self) -> nx.DiGraph:
        """Return the op graph: node = op id (attributes `name`, `backward`), edge = a storage passed on."""
        dag = nx.DiGraph(name=self.name)
        writer: dict[int, int] = {}
        for op in self.ops:
            dag.add_node(op.id, name=op.name, target=op.target, backward=op.backward)
            for s in op.reads:
                if s in writer:
                    dag.add_edge(writer[s], op.id, storage=s, nbytes=self.storages[s].nbytes)
            writer.update(dict.fromkeys(op.writes, op.id))
        return dag

    def verify(self) -> None:
        """Raise GraphplanError, naming op and storage, unless the graph is well formed."""
        self.module.graph.lint()
        written = {s.id for s in self.storages if s.kind.fixed or s.kind is StorageKind.TANGENT}
        turned = False
        for i, op in enumerate(self.ops):
            where = f"op {i} {op.name!r}"
            if op.id != i:
                raise GraphplanError(f"{where} carries id {op.id}")
            for s in op.reads:
                if s not in written:
                    raise GraphplanError(f"{where} reads storage {s} before it is written")
            for s in op.writes:
                if s in written:
                    raise GraphplanError(f"{where} writes storage {s}, which is already written")
            if turned and not op.backward:
                raise GraphplanError(f"{where} is a forward op after the first backward op")
            turned = op.backward
            written.update(op.writes)
        for node in (*self.forward_outputs, *(g for g in self.gradients if g is not None)):
            if not written.issuperset(self.storages_of[node]):
                raise GraphplanError(f"result {node!r} is never written")

    def __str__(self) -> str:
        """Return one line per op: what it writes and reads, with bytes."""
        counts = {k: sum(s.nbytes for s in self.storages if s.kind is k) for k in StorageKind}
        total = ", ".join(f"{k.value} {format_bytes(n)}" for k, n in counts.items() if n)
        lines = [f"# graph {self.name}: {len(self.ops)} ops, {len(self.storages)} storages; {total}"]
        label = {s.id: f"%{s.id}:{s.name}" for s in self.storages}
        turned = False
        for op in self.ops:
            if op.backward and not turned:
                lines.append("--- backward ---")
                turned = True
            writes = ", ".join(f"{label[s]}({format_bytes(self.storages[s].nbytes)})" for s in op.writes)
            lines.append(f"{writes or '()'} = {op.target}({', '.join(label[s] for s in op.reads)})")
        return "\n".join(lines)


def fingerprint_of(module: fx.GraphModule, ops: tuple[GraphOp, ...], storages: tuple[Storage, ...]) -> str:
    """Return a hash of ops, dataflow, shapes, dtypes and names: equal graphs run equal plans.

    The dataflow enters as networkx's Weisfeiler-Lehman hash; names enter because plans name ops.
    """
    digest = hashlib.sha256()
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        meta = [_meta_text(v) for v in _values(node.meta.get("val"))]
        target = target_text(node.target)
        digest.update(f"{node.op}|{node.name}|{target}|{node.args}|{node.kwargs}|{meta}\n".encode())
    dag = nx.Graph()  # bipartite: op names and storages; networkx hashes directed graphs differently by version
    for op in ops:
        dag.add_node(op.name, label=op.target)
        dag.add_edges_from((f"%{s}", op.name) for s in op.reads)
        dag.add_edges_from((op.name, f"%{s}") for s in op.writes)
    for s in storages:
        dag.add_node(f"%{s.id}", label=f"{s.kind.value}:{s.nbytes}")
    digest.update(nx.weisfeiler_lehman_graph_hash(dag, node_attr="label", iterations=2).encode())
    return digest.hexdigest()[:32]


def target_text(target: Any) -> str:
    """Return the name of what a node calls, the same in every process: a function's text has its address."""
    if isinstance(target, FunctionType):
        return f"{target.__module__}.{target.__qualname__}"
    return str(target)


def _values(value: Any) -> tuple[Any, ...]:
    if isinstance(value, dict):
        return tuple(value.values())
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _meta_text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.stride()}{value.device.type}"
    return type(value).__name__


def tensors_of(node: fx.Node) -> tuple[torch.Tensor, ...]:
    """Return the fake tensors that `node` yields (one, several for a multi-output op, none)."""
    return tuple(v for v in _values(node.meta.get("val")) if isinstance(v, torch.Tensor))
