"""build_graph: AOTAutograd's joint export -> Graph. Normalises the fx graph in place, then names its storages."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    GradAOTOutput,
    InputMutationAOTOutput,
    IntermediateBaseAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch._aot_autograd.schemas import OutputType

from graphplan.errors import CaptureError
from graphplan.graph import Graph, GraphOp, Output, Primal, Storage, StorageKind, fingerprint_of, tensors_of

aten = torch.ops.aten
_MODEL = "model."  # the capture wraps the model under this name


def build_graph(joint: Any, model: nn.Module, traced: nn.Module, name: str) -> Graph:
    """Return the Graph of `joint`; `traced` is the module that was exported, with the model under `model.`.

    Raises:
        CaptureError: the graph has an op in place, or mutates an input in a way that cannot be replayed.
    """
    module = joint.graph_module
    module.graph.set_codegen(fx.graph.CodeGen())
    interface = _Interface(joint, model, traced)
    _drop_batch_norm_statistics(module.graph)
    _mend_mixed_batch_norm(module.graph)
    _merge_tied(module.graph, interface, model)
    backward = _split(module.graph, interface)
    _clone_mutated(module.graph, interface, backward)
    interface.rename()
    _Sink.write(module, interface)
    module.graph.eliminate_dead_code(is_impure_node=_is_effect)
    module.recompile()
    storages_of, sizes = _find_storages(module, interface)
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
        fingerprint=fingerprint_of(module, ops, storages),
    )


class _Interface:
    """What goes in and out of the joint graph, read off AOTAutograd's descriptors."""

    def __init__(self, joint: Any, model: nn.Module, traced: nn.Module) -> None:
        graph = joint.graph_module.graph
        self.info = joint._aot_state.fw_metadata.output_info
        self.primals: list[tuple[Primal, fx.Node]] = []
        self.by_desc: dict[Any, int] = {}
        tangent_of: dict[Any, fx.Node] = {}
        for node in graph.find_nodes(op="placeholder"):
            desc = node.meta.get("desc")
            if isinstance(desc, TangentAOTInput):
                tangent_of[desc.output] = node
                continue
            self.by_desc[desc] = len(self.primals)
            self.primals.append((_primal(desc, model, traced), node))
        self.mutations: list[tuple[int, fx.Node]] = []
        self.gradients: list[fx.Node | None] = [None] * len(self.primals)
        self.forward_outputs: list[fx.Node] = []
        self.tangents: list[fx.Node | None] = []
        self.outputs: list[Output] = []
        self._read_results(graph.output_node(), tangent_of)

    def _read_results(self, output: fx.Node, tangent_of: dict[Any, fx.Node]) -> None:
        plain: list[fx.Node] = []
        bases: list[int] = []
        tangents: list[fx.Node | None] = []
        results: Iterable[Any] = output.args[0]  # type: ignore[assignment]
        described = list(zip(results, output.meta["desc"], strict=True))
        for node, desc in described:
            if isinstance(desc, InputMutationAOTOutput):
                if desc in tangent_of:
                    raise CaptureError(f"the model changes an input that requires grad in place ({desc.mutated_input})")
                self._mutate(self.by_desc[desc.mutated_input], node)
            elif isinstance(desc, PlainAOTOutput):
                plain.append(node)
                tangents.append(tangent_of.get(desc))
            elif isinstance(desc, IntermediateBaseAOTOutput):
                bases.append(self._forward_output(node, tangent_of.get(desc)))
            elif isinstance(desc, GradAOTOutput) and node is not None:
                self.gradients[self.by_desc[desc.grad_of]] = node
        for i, node in enumerate(plain):
            output = self._output(self.info[i], node, tangents[i], bases, plain, tangents)
            self.outputs.append(replace(output, detached=not self.info[i].requires_grad))

    def _mutate(self, index: int, node: fx.Node) -> None:
        primal, placeholder = self.primals[index]
        self.primals[index] = (replace(primal, mutated=True), placeholder)
        self.mutations.append((index, node))

    def _forward_output(self, node: fx.Node, tangent: fx.Node | None) -> int:
        if node in self.forward_outputs:
            return self.forward_outputs.index(node)
        self.forward_outputs.append(node)
        self.tangents.append(tangent)
        return len(self.forward_outputs) - 1

    def _output(
        self, info: Any, node: Any, tangent: fx.Node | None, bases: list[int], plain: list[Any], tangents: list[Any]
    ) -> Output:
        if not isinstance(node, fx.Node):
            raise CaptureError(f"the model returns {node!r}, which is not a tensor of the graph")
        kind = info.output_type
        if kind is OutputType.is_input:
            return Output("primal", info.base_idx)
        if kind is OutputType.alias_of_input:
            return Output("primal", info.base_idx, _geometry(node, self.primals[info.base_idx][1]))
        if kind in (OutputType.alias_of_intermediate, OutputType.alias_of_intermediate_save_as_output):
            base = bases[info.base_idx]
            return Output("forward", base, _geometry(node, self.forward_outputs[base]))
        if kind is OutputType.alias_of_intermediate_base_is_user_output:
            base = self._forward_output(plain[info.base_idx], tangents[info.base_idx])
            return Output("forward", base, _geometry(node, self.forward_outputs[base]))
        return Output("forward", self._forward_output(node, tangent))

    def forward_results(self) -> list[fx.Node]:
        """Nodes that the forward half must have computed."""
        return [*self.forward_outputs, *(n for _, n in self.mutations)]

    def keep_primals(self, stands_for: list[int]) -> None:
        """Drop every primal that another one stands for (`stands_for[i] != i`)."""
        kept = [i for i, j in enumerate(stands_for) if i == j]
        new = {i: kept.index(j) for i, j in enumerate(stands_for)}
        self.primals = [self.primals[i] for i in kept]
        self.gradients = [self.gradients[i] for i in kept]
        self.mutations = [(new[i], n) for i, n in self.mutations]
        self.outputs = [replace(o, index=new[o.index]) if o.source == "primal" else o for o in self.outputs]

    def rename(self) -> None:
        """Give graph inputs the names that a person knows them by."""
        for primal, node in self.primals:
            stem = f"input_{primal.index}" if primal.kind is StorageKind.INPUT else primal.path
            _rename(node, f"{primal.kind.value[0]}_{stem}".replace(".", "_"))
        for output, tangent in zip(self.forward_outputs, self.tangents, strict=True):
            if tangent is not None:
                _rename(tangent, f"grad_of_{output.name}")


def _rename(placeholder: fx.Node, name: str) -> None:
    placeholder._rename(name)
    placeholder.target = placeholder.name


class _Sink:
    """The joint graph's results in one flat tuple: forward outputs, new buffer values, gradients."""

    @staticmethod
    def write(module: fx.GraphModule, interface: _Interface) -> None:
        old = module.graph.output_node()
        flat = (*interface.forward_results(), *interface.gradients)
        with module.graph.inserting_before(old):
            module.graph.output(flat)
        module.graph.erase_node(old)


def _primal(desc: Any, model: nn.Module, traced: nn.Module) -> Primal:
    if isinstance(desc, PlainAOTInput):
        return Primal(StorageKind.INPUT, str(desc.idx), desc.idx)
    if not isinstance(desc, ParamAOTInput | BufferAOTInput):
        raise CaptureError(f"unknown kind of graph input {desc!r}: inputs that share memory cannot be planned")
    kind = StorageKind.PARAMETER if isinstance(desc, ParamAOTInput) else StorageKind.BUFFER
    path = desc.target.removeprefix(_MODEL)
    if resolve(model, path) is not None:
        return Primal(kind, path)
    return Primal(StorageKind.CONSTANT, path, value=resolve(traced, desc.target))


def resolve(model: nn.Module, path: str) -> Tensor | None:
    """Return the parameter, buffer or plain tensor attribute at the dotted `path`, None if there is none."""
    owner: Any = model
    *parents, leaf = path.split(".")
    for part in parents:
        owner = owner._modules.get(part) if isinstance(owner, nn.Module) else None
        if owner is None:
            return None
    value = getattr(owner, leaf, None)
    return value if isinstance(value, Tensor) else None


def _geometry(node: fx.Node, base: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return (size, stride, offset from the base's own) of a view."""
    val = node.meta["val"]
    return tuple(val.shape), tuple(val.stride()), int(val.storage_offset()) - int(base.meta["val"].storage_offset())


def _drop_batch_norm_statistics(graph: fx.Graph) -> None:
    """Keep BatchNorm's backward from reading running statistics that the forward mutates.

    In training mode it ignores their values, but takes the parameters' dtype from them: the saved batch
    statistics, which it reads anyway, stand in.
    """
    for node in graph.find_nodes(op="call_function", target=aten.native_batch_norm_backward.default):
        if node.args[7] is True:
            node.args = (*node.args[:3], *node.args[5:7], *node.args[5:])


def _mend_mixed_batch_norm(graph: fx.Graph) -> None:
    """Give BatchNorm's saved statistics the parameters' dtype: torch's fake kernel says the input's (bfloat16)."""
    for node in graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_functional.default):
        weight = node.args[1]
        if not isinstance(weight, fx.Node) or not node.meta["val"][0].is_cpu:
            continue
        dtype = weight.meta["val"].dtype
        node.meta["val"] = tuple(v.to(dtype) if i in (1, 2) else v for i, v in enumerate(node.meta["val"]))
        for item in node.users:
            item.meta["val"] = node.meta["val"][item.args[1]]


def _merge_tied(graph: fx.Graph, interface: _Interface, model: nn.Module) -> None:
    """Let one placeholder stand for each parameter, however many names it has.

    Its gradients are added in place, as autograd's own accumulation does: the sum needs no third copy.
    """
    first: dict[int, int] = {}
    stands_for: list[int] = []
    for i, (primal, node) in enumerate(interface.primals):
        tensor = resolve(model, primal.path) if primal.kind is StorageKind.PARAMETER else None
        j = first.setdefault(id(tensor), i) if tensor is not None else i
        stands_for.append(j)
        if i == j:
            continue
        node.replace_all_uses_with(interface.primals[j][1])
        graph.erase_node(node)
        mine, other = interface.gradients[i], interface.gradients[j]
        if mine is not None and other is not None:
            interface.gradients[j] = _add_in_place(graph, other, mine)
        elif mine is not None:
            interface.gradients[j] = mine
    interface.keep_primals(stands_for)


def _add_in_place(graph: fx.Graph, a: fx.Node, b: fx.Node) -> fx.Node:
    order = {n: i for i, n in enumerate(graph.nodes)}
    with graph.inserting_after(max(a, b, key=lambda n: order[n])):
        total = graph.call_function(aten.add_.Tensor, (a, b))
    total.meta.update(val=a.meta["val"], graphplan_in_place=True)
    return total


def _split(graph: fx.Graph, interface: _Interface) -> set[fx.Node]:
    """Return the backward nodes, after moving every forward node in front of them.

    Backward is what depends on a tangent, and what was traced after it without being needed by a forward result.
    """
    tainted = {t for t in interface.tangents if t is not None}
    needed = _ancestors(interface.forward_results())
    backward: set[fx.Node] = set()
    started = False
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if any(a in tainted for a in node.all_input_nodes):
            tainted.add(node)
            started = True
        if started and node not in needed:
            backward.add(node)
    anchor: fx.Node | None = None
    for node in list(graph.nodes):
        if node in backward and anchor is None:
            anchor = node
        elif anchor is not None and node.op in ("call_function", "get_attr") and node not in backward:
            anchor.prepend(node)
    return backward


def _ancestors(nodes: Iterable[Any]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [n for n in nodes if isinstance(n, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _clone_mutated(graph: fx.Graph, interface: _Interface, backward: set[fx.Node]) -> None:
    """Where the backward reads the old value of something the forward mutates, keep a copy of the old value."""
    first = next((n for n in graph.nodes if n.op != "placeholder"), None)
    for primal, node in interface.primals:
        readers = [u for u in _view_readers(node) if u in backward] if primal.mutated else []
        if not readers or first is None:
            continue
        with graph.inserting_before(first):
            copy = graph.call_function(aten.clone.default, (node,))
        copy.meta["val"] = node.meta["val"].clone()
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)


def _view_readers(node: fx.Node) -> set[fx.Node]:
    """Return every node that reads `node`'s storage, through views too."""
    base = {t.untyped_storage()._cdata for t in tensors_of(node)}
    found: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user in found:
            continue
        found.add(user)
        if any(t.untyped_storage()._cdata in base for t in tensors_of(user)):
            stack.extend(user.users)
    return found


def is_random(node: fx.Node) -> bool:
    """Return whether running `node` draws from a random stream."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    schema = node.target._schema  # type: ignore[union-attr]
    for i, arg in enumerate(schema.arguments):
        if arg.name == "dropout_p":
            p = node.args[i] if i < len(node.args) else node.kwargs.get(arg.name, arg.default_value)
            return p != 0.0
    return True


def _is_effect(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or is_random(node)


def _find_storages(module: fx.GraphModule, interface: _Interface) -> tuple[dict[str, tuple[int, ...]], list[int]]:
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
        aliased = _aliased_input(node)
        if aliased is not None:
            of[node.name] = of[aliased.name]
            continue
        found = []
        for t in tensors_of(node):
            key = t.untyped_storage()._cdata
            if key not in ids:
                ids[key] = len(sizes)
                sizes.append(t.untyped_storage().nbytes())
            found.append(ids[key])
        of[node.name] = tuple(found)
    return of, sizes


def _aliased_input(node: fx.Node) -> fx.Node | None:
    """Return the input that the schema says a single-result op is a view of."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or len(schema.returns) != 1 or schema.returns[0].alias_info is None:
        return None
    wanted = schema.returns[0].alias_info.before_set
    for arg, value in zip(schema.arguments, node.args, strict=False):
        if arg.alias_info is not None and arg.alias_info.before_set & wanted and isinstance(value, fx.Node):
            return value
    return None


def _make_ops(
    graph: fx.Graph, storages_of: dict[str, tuple[int, ...]], interface: _Interface, backward: set[fx.Node]
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
        pure = schema is not None and not random and not in_place and mutated.isdisjoint(reads)
        ops.append(
            GraphOp(len(ops), node, node.name, str(node.target), reads, writes, node in backward, random, pure)
        )
    return tuple(ops)


def _name_storages(
    graph: fx.Graph,
    interface: _Interface,
    ops: tuple[GraphOp, ...],
    storages_of: dict[str, tuple[int, ...]],
    sizes: list[int],
) -> tuple[Storage, ...]:
    names: dict[int, str] = {}
    for node in graph.nodes:
        if node.op == "output" or (node.op == "call_function" and len(tensors_of(node)) > 1):
            continue  # a multi-output op's storages are named after its getitems
        for s in storages_of[node.name]:
            names.setdefault(s, node.name)
    for op in ops:
        for i, s in enumerate(op.writes):
            names.setdefault(s, f"{op.name}_{i}")
    kinds = dict.fromkeys(range(len(sizes)), StorageKind.FORWARD)
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
    return tuple(Storage(i, names.get(i, f"storage_{i}"), nbytes, kinds[i]) for i, nbytes in enumerate(sizes))
