"""build_graph: AOTAutograd's joint export -> Graph: which nodes are ops, which storages they read and write."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphplan.errors import CaptureError, UnsupportedModel
from graphplan.graph import Graph, GraphOp, Storage, StorageKind, fingerprint_of, target_text, tensors_of
from graphplan.interface import Interface
from graphplan.passes import Extend, aliased_input, is_random, normalise, reorder

# Results that a kernel may make an element longer and then cut, which keeps their memory; their fakes do not say so.
CUT = {torch.ops.aten._embedding_bag.default: (1, 2)}


def build_graph(
    joint: Any, model: nn.Module, traced: nn.Module, name: str, prefix: str, extend: Extend | None = None
) -> Graph:
    """Return the Graph of `joint`; `traced` is the module that was exported, with the model under `prefix`.

    Raises:
        UnsupportedModel: there is no gradient, or something is sparse or draws from a torch.Generator.
        CaptureError: the graph has an op in place, or mutates an input in a way that cannot be replayed.
    """
    module = joint.graph_module
    module.graph.set_codegen(fx.graph.CodeGen())
    _check_values(module.graph)
    interface = Interface(joint, model, traced, prefix)
    if extend is None and all(g is None for g in interface.gradients):  # an extension says it in its words
        raise UnsupportedModel(
            "no output depends on a trainable parameter, or on an input that requires grad: look for detach, no_grad "
            "and integer outputs in the forward"
        )
    backward = normalise(module, interface, model, extend)
    graph = _assemble(module, interface, backward, name)
    as_traced = [op.name for op in graph.ops]
    if reorder(graph):
        graph = _assemble(module, interface, backward, name)
    ids = {op.name: op.id for op in graph.ops}
    fingerprint = fingerprint_of(module, graph.ops, graph.storages)
    return replace(graph, fingerprint=fingerprint, traced=tuple(ids[name] for name in as_traced))


def _check_values(graph: fx.Graph) -> None:
    """Refuse what has no dense memory, and generators: a plan cannot put them back where they were."""
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(graph.owning_module, str(node.target), None), torch.Generator):
            raise UnsupportedModel(
                f"the forward draws random numbers from a torch.Generator{_line(node)}, which cannot be planned: use "
                "torch.manual_seed outside the model, or pass the numbers as an input"
            )
        for t in tensors_of(node):
            if t.layout is not torch.strided:
                raise UnsupportedModel(
                    f"{node.name!r} is a sparse tensor ({t.layout}){_line(node)}; only dense ones are planned: use "
                    "sparse=False in embeddings, to_dense() elsewhere"
                )


def _line(node: fx.Node) -> str:
    """Return the last line of the stack that the op was traced at, as " at ...", nothing where none is known."""
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    places = [line.strip() for line in lines if line.strip().startswith("File ")]
    return f" at {places[-1]}" if places else ""


def _assemble(module: fx.GraphModule, interface: Interface, backward: set[fx.Node], name: str) -> Graph:
    storages_of, sizes = _find_storages(module, interface.tangents)
    ops = _make_ops(module.graph, storages_of, interface, backward)
    storages = _name_storages(module.graph, interface, ops, storages_of, sizes)
    return Graph(
        module=module,
        name=name,
        primals=tuple(replace(p, node=n.name) for p, n in interface.primals),
        outputs=tuple(interface.outputs),
        forward_outputs=tuple(n.name for n in interface.forward_outputs),
        tangents=tuple(t.name if t is not None else None for t in interface.tangents),
        mutations=tuple((i, n.name) for i, n in interface.mutations),
        gradients=tuple(g.name if g is not None else None for g in interface.gradients),
        storages=storages,
        ops=ops,
        storages_of=storages_of,
        fingerprint="",
    )


def _find_storages(
    module: fx.GraphModule, tangents: Container[fx.Node | None]
) -> tuple[dict[str, tuple[int, ...]], list[int]]:
    """Return the storages behind every node's value and the size of each.

    Views are found by shared fake storage, and by the alias annotations of the op's schema.
    """
    ids: dict[int, int] = {}
    sizes: list[int] = []
    of: dict[str, tuple[int, ...]] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "get_attr":
            node.meta.setdefault("val", getattr(module, str(node.target)))
        aliased = aliased_input(node)
        if aliased is not None:
            of[node.name] = of[aliased.name]
            continue
        if node in tangents:
            # Parts of one tensor are traced as views of one; autograd hands over a dense gradient for each.
            (t,) = tensors_of(node)
            of[node.name] = (len(sizes),)
            sizes.append(t.numel() * t.element_size())
            continue
        found = []
        for i, t in enumerate(tensors_of(node)):
            key = t.untyped_storage()._cdata
            if key not in ids:
                ids[key] = len(sizes)
                sizes.append(_nbytes(t, cut=i in CUT.get(node.target, ())))
            found.append(ids[key])
        of[node.name] = tuple(found)
    return of, sizes


def _nbytes(t: Tensor, cut: bool) -> int:
    return t.untyped_storage().nbytes() + (t.element_size() if cut else 0)


def _make_ops(
    graph: fx.Graph, storages_of: dict[str, tuple[int, ...]], interface: Interface, backward: set[fx.Node]
) -> tuple[GraphOp, ...]:
    mutated = {s for p, n in interface.primals if p.mutated for s in storages_of[n.name]}
    written = {s for n in graph.nodes if n.op in ("placeholder", "get_attr") for s in storages_of[n.name]}
    ops: list[GraphOp] = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        writes = tuple(dict.fromkeys(s for s in storages_of[node.name] if s not in written))
        in_place = "graphplan_in_place" in node.meta
        if not writes and not in_place and not is_random(node):
            continue  # a view
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and not in_place:
            raise CaptureError(f"op {node.name!r} ({node.target}) works in place and cannot be planned")
        written.update(writes)
        reads = tuple(dict.fromkeys(s for a in node.all_input_nodes for s in storages_of[a.name]))
        random = is_random(node)
        known = schema is not None or "graphplan_pure" in node.meta
        pure = known and not random and not in_place and mutated.isdisjoint(reads)
        ops.append(
            GraphOp(len(ops), node, node.name, target_text(node.target), reads, writes, node in backward, random, pure)
        )
    return tuple(ops)


def _name_storages(
    graph: fx.Graph,
    interface: Interface,
    ops: tuple[GraphOp, ...],
    storages_of: dict[str, tuple[int, ...]],
    sizes: list[int],
) -> tuple[Storage, ...]:
    names: dict[int, str] = {}
    kinds = _storage_kinds(graph, interface, ops, storages_of, len(sizes))
    for node in graph.nodes:
        if node.op == "output" or (node.op == "call_function" and len(tensors_of(node)) > 1):
            continue  # a multi-output op's storages are named after its getitems
        for s in storages_of[node.name]:
            names.setdefault(s, node.name)
    for op in ops:
        for i, s in enumerate(op.writes):
            names.setdefault(s, f"{op.name}_{i}")
    return tuple(Storage(i, names.get(i, f"storage_{i}"), nbytes, kinds[i]) for i, nbytes in enumerate(sizes))


def _storage_kinds(
    graph: fx.Graph,
    interface: Interface,
    ops: tuple[GraphOp, ...],
    storages_of: dict[str, tuple[int, ...]],
    count: int,
) -> dict[int, StorageKind]:
    kinds = dict.fromkeys(range(count), StorageKind.FORWARD)
    for op in ops:
        for s in op.reads if op.backward else ():
            if kinds[s] is StorageKind.FORWARD:
                kinds[s] = StorageKind.ACTIVATION
        if op.backward:
            kinds.update(dict.fromkeys(op.writes, StorageKind.BACKWARD))

    def mark(nodes: Iterable[fx.Node | None], kind: Callable[[fx.Node], StorageKind]) -> None:
        for n in nodes:
            for s in storages_of[n.name] if n is not None else ():
                kinds[s] = kind(n)  # type: ignore[arg-type]

    mark(interface.gradients, lambda _: StorageKind.GRADIENT)
    mark(interface.forward_outputs, lambda _: StorageKind.OUTPUT)
    mark(interface.tangents, lambda _: StorageKind.TANGENT)
    mark(graph.find_nodes(op="get_attr"), lambda _: StorageKind.CONSTANT)
    fixed = {n: p.kind for p, n in interface.primals}
    mark(list(fixed), lambda n: fixed[n])
    return kinds
