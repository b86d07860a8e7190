"""read_program: JSON text -> Program. Everything is checked on fake tensors before anything is built."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _BoxedCodeGen
from torch.optim import Optimizer

from graphplan.capture import Capture
from graphplan.graph import Graph, Output, Primal, StorageKind
from graphplan.program.check import check_graph
from graphplan.program.document import (
    FORMAT,
    MOST_NODES,
    MOST_TEXT,
    VERSION,
    Geometry,
    ProgramError,
    need,
    read_count,
    read_path,
    read_value,
)
from graphplan.program.ops import target_named
from graphplan.program.run import ProgramStep
from graphplan.step.optimizer import Slots
from graphplan.step.program import WholeProgram
from graphplan.step.updates import RULES
from graphplan.tree import Template

_KINDS = {"trained", "parameter", "buffer", "constant"}
_KEYS = {
    "format", "version", "torch", "model", "fingerprint", "budget_bytes", "peak_bytes", "update", "tensors", "inputs",
    "calls", "loss", "results",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the state: where it is, its geometry, and for constants its value."""

    path: str
    kind: str
    geometry: Geometry
    same_as: str = ""
    value: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Program:
    """A checked program. `floor_bytes` is what its tensors alone take at the worst moment, without any op's scratch."""

    model: str
    fingerprint: str
    budget_bytes: int
    peak_bytes: int
    floor_bytes: int
    update: str
    entries: tuple[Entry, ...]
    inputs: tuple[Geometry, ...]
    primals: tuple[Primal, ...]
    graph: fx.Graph = field(repr=False, compare=False)

    def make_model(self) -> nn.Module:
        """Return a module that holds the program's parameters and buffers, all zero: its state dict is the model's.

        It has no forward: programs know how to train it.
        """
        root = nn.Module()
        made: dict[str, Tensor] = {}
        for e in self.entries:
            *parents, leaf = e.path.split(".")
            owner = root
            for name in parents:
                if name not in owner._modules:
                    _add(owner.add_module, name, nn.Module())
                owner = owner._modules[name]  # type: ignore[assignment]
            if e.same_as:
                value = made[e.same_as]
            elif e.value is not None:
                value = e.value.clone()
            else:
                value = e.geometry.empty().zero_()
            if e.kind in ("trained", "parameter") and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=e.kind == "trained")
            made[e.path] = value
            if isinstance(value, nn.Parameter):
                _add(owner.register_parameter, leaf, value)
            else:
                _add(partial(owner.register_buffer, persistent=e.kind == "buffer"), leaf, value)
        return root

    def bind(self, model: nn.Module, optimizer: Optimizer) -> ProgramStep:
        """Return the step that trains `model` (of `make_model`, or the same state) with `optimizer`.

        Raises:
            ProgramError: tensors of another geometry than the program's, or another kind of optimizer.
        """
        update = RULES[type(optimizer)].update.__name__ if type(optimizer) in RULES else type(optimizer).__name__
        need(update == self.update, f"the program updates by {self.update}, the optimizer is {update}")
        groups = 1 + max((p.index for p in self.primals if p.kind is StorageKind.SETTINGS), default=-1)
        need(len(optimizer.param_groups) == groups, f"the program has {groups} groups of parameters")
        held = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        for e in self.entries:
            need(e.path in held and Geometry.of(held[e.path]) == e.geometry, f"the model has no such {e.path!r}")
        module = fx.GraphModule(nn.Module(), self.graph, "Program")
        names = tuple(n.name for n in self.graph.output_node().all_input_nodes)
        graph = Graph(
            module=module, name=self.model, primals=self.primals, outputs=(Output("forward", 0),),
            forward_outputs=names, tangents=(), mutations=(), gradients=(None,) * len(self.primals), storages=(),
            ops=(), storages_of={}, fingerprint=self.fingerprint,
        )  # fmt: skip
        program = WholeProgram.running(Capture(graph, Template((), ()), Template((), ())), module)
        return ProgramStep(model, optimizer, Slots.of(optimizer, model), program, self.inputs)


def _add(register: Callable[[str, Any], object], name: str, value: Any) -> None:
    try:
        register(name, value)
    except KeyError as e:
        raise ProgramError(f"{name!r} cannot be a parameter's name: {e}") from e


def read_program(text: str, most_bytes: int) -> Program:
    """Read what `write_program` wrote, for a machine that has `most_bytes` for the whole step.

    Raises:
        ProgramError: damaged, an op outside the allow-list, arguments that do not fit, or too large.
    """
    data = _parsed(text)
    entries = _entries(data["tensors"], most_bytes)
    primals, geometries = _inputs(data["inputs"], entries, most_bytes)
    graph = _graph(data, len(primals), most_bytes)
    floor = check_graph(graph, primals, entries, geometries, str(data["update"]), most_bytes)
    peak = read_count(data["peak_bytes"], "peak_bytes")
    need(floor <= peak, f"peak_bytes is {peak}, but its tensors alone take {floor}")
    return Program(
        model=str(data["model"])[:200],
        fingerprint=str(data["fingerprint"])[:64],
        budget_bytes=read_count(data["budget_bytes"], "budget_bytes"),
        peak_bytes=peak,
        floor_bytes=floor,
        update=str(data["update"]),
        entries=entries,
        inputs=geometries,
        primals=primals,
        graph=graph,
    )


def _parsed(text: str) -> dict[str, Any]:
    need(len(text) <= MOST_TEXT, f"the program has more than {MOST_TEXT} characters")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ProgramError(f"not JSON (truncated?): {e}") from e
    need(isinstance(data, dict) and data.get("format") == FORMAT, f"not a program: expected format {FORMAT!r}")
    need(data["version"] == VERSION if "version" in data else False, f"this graphplan reads version {VERSION}")
    need(data.keys() == _KEYS, f"expected the fields {sorted(_KEYS)}")
    for key in ("tensors", "inputs", "calls", "results"):
        good = isinstance(data[key], list) and len(data[key]) <= MOST_NODES
        need(good, f"{key}: expected a list of at most {MOST_NODES}")
    return dict(data)


def _entries(rows: list[Any], most_bytes: int) -> tuple[Entry, ...]:
    found: dict[str, Entry] = {}
    left = most_bytes
    for i, row in enumerate(rows):
        where = f"tensor {i}"
        need(
            isinstance(row, dict) and row.keys() >= {"path", "kind", "geometry"}, f"{where}: no path, kind or geometry"
        )
        path, kind = read_path(row["path"], where), row["kind"]
        need(
            isinstance(kind, str) and kind in _KINDS and path not in found,
            f"{where}: {path!r} of kind {str(kind)[:20]!r}",
        )
        geometry = Geometry.read(row["geometry"], f"{where} ({path})", left)
        same = row.get("same_as", "")
        if same != "":
            first = found.get(same) if isinstance(same, str) else None
            need(first is not None and (first.geometry, first.kind) == (geometry, kind), f"{where}: same as what?")
        else:
            left -= geometry.nbytes
        value = _value(row.get("value"), geometry, where) if kind == "constant" else None
        found[path] = Entry(path, kind, geometry, same, value)
    return tuple(found.values())


def _value(text: Any, geometry: Geometry, where: str) -> Tensor:
    try:
        data = base64.b64decode(text if isinstance(text, str) else "", validate=True)
    except binascii.Error as e:
        raise ProgramError(f"{where}: its value is not base64: {e}") from e
    out = geometry.empty()
    need(len(data) == out.numel() * out.element_size(), f"{where}: {len(data)} bytes of value")
    if data:
        out.copy_(torch.frombuffer(bytearray(data), dtype=geometry.dtype).view(geometry.shape))
    return out


def _inputs(
    rows: list[Any], entries: tuple[Entry, ...], most_bytes: int
) -> tuple[tuple[Primal, ...], tuple[Geometry, ...]]:
    kinds = {e.path: e.kind for e in entries}
    fixed = {"trained": StorageKind.PARAMETER, "parameter": StorageKind.PARAMETER, "buffer": StorageKind.BUFFER}
    primals: list[Primal] = []
    geometries: dict[int, Geometry] = {}
    for i, row in enumerate(rows):
        where = f"input {i}"
        need(isinstance(row, list) and len(row) >= 2, f"{where}: expected a list")
        match row:
            case ["tensor", path] if isinstance(path, str) and path in kinds:
                primals.append(Primal(fixed.get(kinds[path], StorageKind.BUFFER), path))
            case ["state", path] if isinstance(path, str) and kinds.get(path) == "trained":
                read = any(p.path == path and p.kind is StorageKind.PARAMETER for p in primals)
                need(read, f"{where}: state of a parameter that comes later")
                primals.append(Primal(StorageKind.STATE, path))
            case ["settings", index]:
                primals.append(Primal(StorageKind.SETTINGS, "", read_count(index, where, 64)))
            case ["input", index, *geometry]:
                place = read_count(index, where, 64)
                geometries[place] = Geometry.read(geometry, where, most_bytes)
                primals.append(Primal(StorageKind.INPUT, str(place), place))
            case _:
                raise ProgramError(f"{where}: {str(row)[:60]} is nothing that a step reads")
    need(sorted(geometries) == list(range(len(geometries))), "the numbers of the inputs have gaps")
    return tuple(primals), tuple(geometries[i] for i in range(len(geometries)))


def _graph(data: dict[str, Any], inputs: int, most_bytes: int) -> fx.Graph:
    """Return the fx graph of the calls. Names are made here: none of the document's reaches generated code."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"a{i}") for i in range(inputs)]

    def node(i: int) -> fx.Node:
        need(0 <= i < len(nodes), f"call {len(nodes) - inputs}: reads node {i}, which is not made yet")
        return nodes[i]

    for i, row in enumerate(data["calls"]):
        where = f"call {i}"
        need(isinstance(row, list) and len(row) in (2, 3) and isinstance(row[0], str), f"{where}: no call")
        name, args, kwargs = row[0], row[1], row[2] if len(row) == 3 else {}
        target = target_named(name)
        if target is None:
            raise ProgramError(f"{where}: {name[:60]!r} is not on programs' list of ops")
        where = f"{where} ({name})"
        need(isinstance(args, list) and isinstance(kwargs, dict), f"{where}: no arguments")
        _check_arguments(target, args, kwargs, where, most_bytes)
        read_args = tuple(read_value(a, node, where, most_bytes) for a in args)
        read_kwargs = {k: read_value(v, node, where, most_bytes) for k, v in kwargs.items()}
        nodes.append(graph.create_node("call_function", target, read_args, read_kwargs, f"n{i}"))
    results = [node(read_count(r, "results", MOST_NODES)) for r in data["results"]]
    loss = node(read_count(data["loss"], "loss", MOST_NODES))
    need(results and results[0] is loss and len(results) == 1, "a program returns its loss and nothing else")
    graph.output((loss,))
    graph.set_codegen(_BoxedCodeGen())
    return graph


def _check_arguments(target: Any, args: list[Any], kwargs: dict[str, Any], where: str, most_bytes: int) -> None:
    if not isinstance(target, torch._ops.OpOverload):
        need(not kwargs, f"{where}: takes no keywords")
        for sizes in (a for a in args if isinstance(a, list)):  # these functions loop over what they are told
            large = math.prod(n for n in sizes if type(n) is int) > most_bytes
            need(not large, f"{where}: {sizes[:9]} is too large")
        return
    schema = target._schema.arguments
    positional = [a.name for a in schema if not a.kwarg_only]
    need(len(args) <= len(positional), f"{where}: {len(args)} arguments; it takes {len(positional)}")
    given = {*positional[: len(args)]}
    names = {a.name for a in schema}
    need(kwargs.keys() <= names - given, f"{where}: keywords {sorted(kwargs)[:4]}")
    missing = [a.name for a in schema if not a.has_default_value() and a.name not in given | kwargs.keys()]
    need(not missing, f"{where}: lacks {', '.join(missing)}")
