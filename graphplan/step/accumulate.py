"""A weight used many times: each product that its gradient sums is added where it is computed, and never exists alone.

Recurrent networks and parts of a batch have such sums: `addmm` does what `mm` and `add` do, without the product's
memory and the second pass over it. What a matrix kernel adds to a sum may round differently.
"""

from __future__ import annotations

import torch
from torch import fx

from graphplan.interface import Interface

aten = torch.ops.aten
LEAST_BYTES = 1 << 18  # of a gradient; smaller ones are not worth another form of the step


def accumulate_products(
    graph: fx.Graph, interface: Interface, backward: set[fx.Node], *, only_look: bool = False
) -> bool:
    """Replace every sum of a large product and another gradient by one op; return whether there is one."""
    order = {n: t for t, n in enumerate(graph.nodes)}
    alone = backward.difference(n for n in interface.gradients if n is not None)  # not a parameter's whole gradient
    found = False
    for total in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        product = _product(total, backward, alone, order)
        if product is None:
            continue
        found = True
        if not only_look:
            rest = next(n for n in total.all_input_nodes if n is not product)
            total.target, total.args = aten.addmm.default, (rest, *product.args)
            value = product.meta["val"]
            total.meta["graphplan_saves"] = ("adding products where they are computed", value.numel() * value.itemsize)
            backward.discard(product)
            graph.erase_node(product)
    return found


def _product(total: fx.Node, backward: set[fx.Node], alone: set[fx.Node], order: dict[fx.Node, int]) -> fx.Node | None:
    """Return the later of the products that `total`, a sum of two gradients, reads alone."""
    operands = total.all_input_nodes
    if total not in backward or len(operands) != 2 or total.kwargs:
        return None
    value, values = total.meta["val"], [n.meta["val"] for n in operands]
    if any((v.shape, v.dtype) != (value.shape, value.dtype) for v in values):
        return None
    if not value.dtype.is_floating_point or value.numel() * value.itemsize < LEAST_BYTES:
        return None
    products = [n for n in operands if n.target is aten.mm.default and len(n.users) == 1 and n in alone]
    return max(products, key=order.__getitem__, default=None)
