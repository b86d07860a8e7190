"""What codecs look for, the captured nodes that own activations, and the instructions that they make of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from graphplan.graph import Graph, GraphOp, StorageKind
from graphplan.instructions import Emitter, Encoded, Instruction, results_of

Target = Callable[..., Any]
Call = tuple[Target, tuple[Any, ...]]


def saved_nodes(graph: Graph) -> Iterator[tuple[fx.Node, int]]:
    """Yield (node, storage) for each activation that is the whole result, or one whole item, of a forward op."""
    for op in graph.ops:
        if op.backward:
            continue
        for node in results_of(graph, op.node, op.writes):
            storages = graph.storages_of[node.name]
            single = node is not op.node or len(op.writes) == 1
            if single and len(storages) == 1 and graph.storages[storages[0]].kind is StorageKind.ACTIVATION:
                yield node, storages[0]


def backward_readers(graph: Graph) -> dict[int, list[GraphOp]]:
    """Return the backward ops that read each storage."""
    readers: dict[int, list[GraphOp]] = {}
    for op in graph.ops:
        for s in op.reads if op.backward else ():
            readers.setdefault(s, []).append(op)
    return readers


def base_of(graph: Graph, node: fx.Node) -> fx.Node:
    """Follow views (not getitems of an op) from `node` to the node that owns its storage."""
    ops = {op.node for op in graph.ops}
    while node not in ops and node.target is not operator.getitem and node.op == "call_function":
        node = node.all_input_nodes[0]
    return node


def target_of(node: fx.Node) -> torch._ops.OpOverload:
    """Return the ATen op that a node calls."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target


def packed(id_: int, name: str, nbytes: int, storage: int, codec: str) -> Encoded:
    """Return an encoding of `storage` in `nbytes` bytes of uint8."""
    like = torch.empty(nbytes, dtype=torch.uint8, device="meta")
    return Encoded(id_, name, nbytes, storage, codec, like)


def encode(
    node: fx.Node, storage: int, new: Encoded, target: Target, args: tuple[Any, ...], *, keyed: bool = False
) -> Instruction:
    """Return the instruction that makes the encoding by `target(node, *args)`; `keyed`: key, slot follow."""

    def emit(out: Emitter) -> None:
        key = (out.key(), storage) if keyed else ()
        out.store_encoded(new.id, out.call(target, (out.load(node), *args, *key), new.name))

    return Instruction(new.name, "encode", None, (storage,), (new.id,), True, emit)


def decode(
    node: fx.Node, storage: int, new: Encoded, suffix: str, target: Target, args: tuple[Any, ...]
) -> Instruction:
    """Return the instruction that makes `node` again by `target(encoding, *args)`."""
    name = f"{node.name}__{suffix}"

    def emit(out: Emitter) -> None:
        out.store(node, out.call(target, (out.load_encoded(new.id), *args), name))

    return Instruction(name, "decode", None, (new.id,), (storage,), True, emit)


def instead(
    graph: Graph,
    op: GraphOp,
    storage: int,
    new: Encoded,
    suffix: str,
    call: Callable[[Emitter], Call],
    takes_over: int | None = None,
) -> Instruction:
    """Return the instruction that does backward `op`'s work with the encoding `new` in place of `storage`."""

    def emit(out: Emitter) -> None:
        value = out.call(*call(out), op.name)
        for result in results_of(graph, op.node, op.writes):
            item = value if result is op.node else out.call(operator.getitem, (value, result.args[1]), result.name)
            out.store(result, item)

    reads = (*(s for s in op.reads if s != storage and not graph.storages[s].kind.fixed), new.id)
    return Instruction(f"{op.name}__{suffix}", "variant", op.id, reads, op.writes, True, emit, takes_over)
