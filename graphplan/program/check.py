"""check_graph: one run of a program's calls on fake tensors: kernels' own checks, our rules, and bytes in use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphplan.graph import Primal, StorageKind
from graphplan.program.document import Geometry, ProgramError, check_bytes, need
from graphplan.program.rules import check_call
from graphplan.step.updates import RULES
from graphplan.tree import Template


class Placed(Protocol):
    """An entry of the state."""

    @property
    def path(self) -> str:
        """Where it is."""

    @property
    def geometry(self) -> Geometry:
        """Its geometry."""

    @property
    def same_as(self) -> str:
        """The path whose tensor it is, too."""


def check_graph(
    graph: fx.Graph,
    primals: Sequence[Primal],
    entries: Sequence[Placed],
    inputs: Sequence[Geometry],
    update: str,
    most_bytes: int,
) -> int:
    """Return the most bytes of tensors in use at once; each node's fake value is left in its meta.

    Raises:
        ProgramError: a call that its kernel or a rule refuses, that depends on data, or more than `most_bytes`.
    """
    settings = _settings(update)
    with FakeTensorMode() as mode, torch.no_grad():
        held = {e.path: e.geometry.empty() for e in entries if not e.same_as}
        held.update((e.path, held[e.same_as]) for e in entries if e.same_as)
        made: list[Any] = []
        for primal in primals:
            if primal.kind is StorageKind.SETTINGS:
                made.append(dict(settings))
            elif primal.kind is StorageKind.STATE:
                made.append({})
            elif primal.kind is StorageKind.INPUT:
                made.append(inputs[primal.index].empty())
            else:
                made.append(held[primal.path])
        return _Walk(graph, made, list(held.values()), most_bytes).run(mode)


def _settings(update: str) -> dict[str, Any]:
    kind = next((k for k, rule in RULES.items() if rule.update.__name__ == update), None)
    if kind is None:
        raise ProgramError(
            f"no update {update[:40]!r}; there are {', '.join(r.update.__name__ for r in RULES.values())}"
        )
    return dict(kind([torch.zeros(1)], lr=1e-3).param_groups[0])


class _Walk:
    """The calls one after another; a storage is in use from its making to the last read of any value on it."""

    def __init__(self, graph: fx.Graph, inputs: Sequence[Any], resident: Sequence[Tensor], most_bytes: int) -> None:
        self.graph, self.most_bytes = graph, most_bytes
        self.uses: Counter[int] = Counter()
        self.sizes: dict[int, int] = {}
        self.used = self.peak = 0
        self.fixed = {t.untyped_storage()._cdata for t in _tensors((list(inputs), list(resident)))}
        self._hold((list(inputs), list(resident)))
        for node, value in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
            node.meta["val"] = value

    def run(self, mode: FakeTensorMode) -> int:
        last = {a: n for n in self.graph.nodes for a in n.all_input_nodes}
        for i, node in enumerate(n for n in self.graph.nodes if n.op == "call_function"):
            where = f"call {i} ({node.target})"
            value = self._call(node, where)
            node.meta["val"] = value
            self._hold(value)
            check_bytes(self.used, self.most_bytes, where)
            for done in {*node.all_input_nodes, node}:
                if last.get(done, node) is node and done.op == "call_function":
                    self._drop(done.meta["val"])
        loss = self.graph.output_node().args[0][0].meta["val"]  # type: ignore[index,union-attr]
        scalar = isinstance(loss, Tensor) and loss.numel() == 1 and loss.dtype.is_floating_point
        need(scalar, "the loss is not one floating number")
        return self.peak

    def _call(self, node: fx.Node, where: str) -> Any:
        args = fx.map_arg(node.args, lambda n: n.meta["val"])
        kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
        try:
            check_call(node, args, kwargs, where)
            self._check_written(node, args, kwargs, where)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except ProgramError:
            raise
        except Exception as e:  # what a kernel says of arguments may be any error
            said = (str(e).splitlines() or [""])[0][:200]
            raise ProgramError(f"{where} cannot run: {type(e).__name__}: {said}") from e

    def _check_written(self, node: fx.Node, args: Any, kwargs: Any, where: str) -> None:
        """Integers made by the program stay as they were made: rules follow indices to where they come from."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return
        schema = node.target._schema.arguments
        values = {**{a.name: v for a, v in zip(schema, args, strict=False)}, **kwargs}
        for a in schema:
            value = values.get(a.name)
            if a.alias_info is None or not a.alias_info.is_write or not isinstance(value, Tensor):
                continue
            inside = value.untyped_storage()._cdata not in self.fixed
            need(value.dtype.is_floating_point or not inside, f"{where}: writes over integers")

    def _hold(self, value: Any) -> None:
        for t in _tensors(value):
            key = t.untyped_storage()._cdata
            self.uses[key] += 1
            if self.uses[key] == 1:
                self.sizes[key] = t.untyped_storage().nbytes()
                self.used += self.sizes[key]
        self.peak = max(self.peak, self.used)

    def _drop(self, value: Any) -> None:
        for t in _tensors(value):
            key = t.untyped_storage()._cdata
            self.uses[key] -= 1
            if self.uses[key] == 0:
                self.used -= self.sizes[key]


def _tensors(value: Any) -> list[Tensor]:
    return Template.of(value)[1] if isinstance(value, dict) else _flat(value)


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _flat(v)] if isinstance(value, list | tuple) else []
