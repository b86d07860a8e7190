"""extend: a normalised joint graph + an optimizer's slots -> the graph of a whole step, updates included."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphplan.errors import CaptureError
from graphplan.functions import max_pool2d_to_codes
from graphplan.graph import Primal, StorageKind, tensors_of
from graphplan.interface import Interface, resolve
from graphplan.step.accumulate import accumulate_products
from graphplan.step.chunked import chunk_loss
from graphplan.step.clip import Clip, clip_gradients
from graphplan.step.optimizer import Slots
from graphplan.step.pools import pack_pools
from graphplan.step.slices import SLICED
from graphplan.step.slicing import LEAST_BYTES, product_of, slice_backward, slice_forward
from graphplan.step.updates import PIECE

aten = torch.ops.aten


@dataclass(slots=True)
class Found:
    """What an Extension saw: rewrites that keep not every bit (done, or possible), and ops that work in slices."""

    inexact: bool = False
    sliced: bool = False


@dataclass(frozen=True, slots=True)
class Extension:
    """Makes a step of a joint graph with a scalar loss: called by `build_graph` on the normalised graph."""

    model: nn.Module
    slots: Slots
    kept: frozenset[int]  # ids of the parameters whose gradients the step returns
    clip: Clip
    exact: bool = True  # only rewrites that keep every bit
    two_pass: bool = False  # of the backward, where a norm clips
    sliced: bool = True  # large ops work in slices
    updates: bool = True  # else the step ends with the gradients that it would update from
    found: Found = field(default_factory=Found)  # in the latest call

    def __call__(self, graph: fx.Graph, interface: Interface, backward: set[fx.Node]) -> None:
        """Give the loss's gradient its value, drop gradients that nobody wants, add the updates."""
        _start_backward(graph, interface, backward)
        inexact = chunk_loss(graph, interface, backward, only_look=self.exact)
        inexact = slice_forward(graph, backward, only_look=self.exact) or inexact
        inexact = accumulate_products(graph, interface, backward, only_look=self.exact) or inexact
        if self.sliced:
            pack_pools(graph, interface, backward, LEAST_BYTES)
            inexact = slice_backward(graph, interface, backward, self.exact) or inexact
        updated: list[tuple[int, int]] = []  # (primal, group)
        for i, (primal, _) in enumerate(interface.primals):
            param = resolve(self.model, primal.path) if primal.kind is StorageKind.PARAMETER else None
            group = None if param is None else self.slots.group_of.get(id(param))
            if interface.gradients[i] is not None and group is not None:
                updated.append((i, group))
            elif param is None or id(param) not in self.kept:
                interface.gradients[i] = None
        if not self.updates:
            return
        places = _last_uses(graph, backward)
        clip_gradients(graph, interface, [i for i, _ in updated], backward, self.clip, self.two_pass)
        groups = self._add_settings(graph, interface)
        order = {n: t for t, n in enumerate(graph.nodes)}
        for i, group in updated:
            ready = (interface.gradients[i], places.get(interface.primals[i][1]))
            place = max((n for n in ready if n is not None), key=order.__getitem__)
            node, product = self._add_update(graph, interface, i, group, groups[group], place, backward)
            backward.add(node)
            inexact = inexact or product
        _settle(graph, backward)
        self.found.inexact = inexact
        self.found.sliced = any(n.target in (*SLICED, max_pool2d_to_codes) for n in graph.nodes)

    def _add_settings(self, graph: fx.Graph, interface: Interface) -> list[fx.Node]:
        nodes = []
        for k in range(self.slots.count):
            primal = Primal(StorageKind.SETTINGS, f"group {k}", k)
            nodes.append(_add_input(graph, interface, primal, f"group_{k}", self.slots.made_settings(k)))
        return nodes

    def _add_update(
        self,
        graph: fx.Graph,
        interface: Interface,
        index: int,
        group: int,
        settings: fx.Node,
        place: fx.Node,
        backward: set[fx.Node],
    ) -> tuple[fx.Node, bool]:
        """Add one update; return it, and whether its gradient is (or could be) a product computed in pieces."""
        primal, param = interface.primals[index]
        grad = interface.gradients[index]
        assert grad is not None
        like = self.slots.state_like(param.meta["val"], group)
        name = f"s_{param.name.removeprefix('p_')}"
        state = _add_input(graph, interface, Primal(StorageKind.STATE, primal.path), name, like)
        kept = id(resolve(self.model, primal.path)) in self.kept
        interface.gradients[index] = grad if kept else None
        product = None if kept or self.clip.on else product_of(grad, param, backward)
        update, args = self.slots.rule.update, (param, grad, state, settings)
        with graph.inserting_after(place):
            if product is None or self.exact:
                node = graph.call_function(update, args)
            else:
                node = graph.call_function(self.slots.rule.of_product, (param, *product, state, settings))
                value = param.meta["val"]
                whole = max(0, value.numel() - PIECE) * value.element_size()
                node.meta["graphplan_saves"] = ("gradients that never exist whole", whole)
        node._rename(f"update_{param.name.removeprefix('p_')}")
        node.meta.update(val=None, graphplan_in_place=True, graphplan_update=True)
        return node, product is not None


def _settle(graph: fx.Graph, backward: set[fx.Node]) -> None:
    """Move every update behind what still uses its parameter: other updates read activations, too."""
    updates = [n for n in graph.nodes if "graphplan_update" in n.meta]
    moved = True
    while moved:
        moved = False
        last, order = _last_uses(graph, backward), {n: t for t, n in enumerate(graph.nodes)}
        for node in updates:
            use = last[node.all_input_nodes[0]]
            if order[use] > order[node] and not moved:
                use.append(node)
                moved = True


def _start_backward(graph: fx.Graph, interface: Interface, backward: set[fx.Node]) -> None:
    """Replace the loss's tangent by its value, one, as `loss.backward()` does."""
    (loss,), (tangent,) = interface.forward_outputs, interface.tangents
    if tangent is None:
        raise CaptureError("the loss does not depend on any parameter that requires grad: there is nothing to train")
    first = next((n for n in graph.nodes if n in backward), graph.output_node())
    with graph.inserting_before(first):
        ones = graph.call_function(aten.ones_like.default, (loss,))
    ones.meta["val"] = torch.empty_like(tangent.meta["val"])
    tangent.replace_all_uses_with(ones)
    graph.erase_node(tangent)
    ones._rename(f"grad_of_{loss.name}")
    interface.tangents = [None]
    backward.add(ones)


def _add_input(graph: fx.Graph, interface: Interface, primal: Primal, name: str, like: Any) -> fx.Node:
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta["val"] = like
    interface.primals.append((primal, node))
    interface.gradients.append(None)
    return node


def _last_uses(graph: fx.Graph, backward: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return, for each node, the last backward op that reads it or anything recomputed from it.

    A plan recomputes a forward op only for what reads its result later: an update behind that op comes after
    every use of the parameter's old value, whatever is recomputed.
    """
    order = {n: t for t, n in enumerate(graph.nodes)}
    last: dict[fx.Node, fx.Node] = {}
    for node in reversed(list(graph.nodes)):
        found = []
        for user in node.users:
            if user in backward and not _is_view(user):
                found.append(user)
            elif user in last:
                found.append(last[user])
        if found:
            last[node] = max(found, key=order.__getitem__)
    return last


def _is_view(node: fx.Node) -> bool:
    own = {t.untyped_storage()._cdata for t in tensors_of(node)}
    read = {t.untyped_storage()._cdata for a in node.all_input_nodes for t in tensors_of(a)}
    return own <= read


def check_loss(value: Any) -> Tensor:
    """Return the loss if it is one tensor of one floating element.

    Raises:
        CaptureError: what the loss function returned instead.
    """
    if not isinstance(value, Tensor):
        raise CaptureError(f"loss_fn returned {type(value).__name__}; a step needs one scalar tensor")
    if value.numel() != 1 or not value.dtype.is_floating_point:
        raise CaptureError(f"loss_fn returned {value.dtype}{tuple(value.shape)}; a step needs one scalar: reduce it")
    return value
