"""What codecs look for: the captured nodes that own activations."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from graphplan.graph import Graph, StorageKind
from graphplan.instructions import results_of


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


def backward_readers(graph: Graph, storage: int) -> list[fx.Node]:
    """Return the backward op nodes that read `storage`."""
    return [op.node for op in graph.ops if op.backward and storage in op.reads]


def base_of(graph: Graph, node: fx.Node) -> fx.Node:
    """Follow views (not getitems of an op) from `node` to the node that owns its storage."""
    ops = {op.node for op in graph.ops}
    while node not in ops and node.target is not operator.getitem and node.op == "call_function":
        node = node.all_input_nodes[0]
    return node
