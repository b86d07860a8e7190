"""write_program: a planned whole step -> JSON text that names its ops; no code, no model source, no pickle."""

from __future__ import annotations

import base64
import json
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphplan.graph import Primal, StorageKind
from graphplan.plan import Plan
from graphplan.program.document import FORMAT, VERSION, Geometry, ProgramError, need, write_value
from graphplan.program.ops import name_of_target
from graphplan.step.program import WholeProgram

MOST_CONSTANT_BYTES = 1 << 20


def write_program(model: nn.Module, program: WholeProgram, plan: Plan, inputs: list[Tensor]) -> str:
    """Return the whole step `program` of `model` as text; parameters and buffers travel apart, as a state dict.

    `inputs` are the example batch's tensors, in the order of the step's call (targets after them).

    Raises:
        ProgramError: an op outside the allow-list, kept gradients, or constants above MOST_CONSTANT_BYTES.
    """
    need(plan.update and not program.kept, "a program is a whole step that keeps no gradients")
    output = program.capture.graph.outputs[0]
    need(output.source == "forward" and output.view is None, "the loss is a view or an input")
    graph = program.module.graph
    nodes = [n for n in graph.nodes if n.op != "output"]
    index = {n: i for i, n in enumerate(nodes)}
    primals = program.capture.graph.primals
    need(all(n.op == "placeholder" for n in nodes[: len(primals)]), "the step has further inputs")
    calls = [_call(n, index) for n in nodes[len(primals) :]]
    results: Any = graph.output_node().args[0]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__,
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "budget_bytes": plan.budget_bytes,
        "peak_bytes": plan.peak_bytes,
        "update": plan.update,
        "tensors": _tensors(model, primals),
        "inputs": [_input(p, inputs) for p in primals],
        "calls": calls,
        "loss": index[results[output.index]],
        "results": [index[n] for n in results],
    }
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def _call(node: fx.Node, index: dict[fx.Node, int]) -> list[Any]:
    name = name_of_target(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
    if name is None:
        raise ProgramError(f"{node.name!r} calls {node.target}, which is not on programs' list of ops")
    where = f"{node.name!r} ({name})"
    args = write_value(node.args, index, where)
    kwargs = {k: write_value(v, index, where) for k, v in node.kwargs.items()}
    return [name, args, kwargs] if kwargs else [name, args]


def _input(primal: Primal, inputs: list[Tensor]) -> list[Any]:
    if primal.kind is StorageKind.INPUT:
        return ["input", primal.index, *Geometry.of(inputs[primal.index]).json()]
    if primal.kind is StorageKind.SETTINGS:
        return ["settings", primal.index]
    return ["state" if primal.kind is StorageKind.STATE else "tensor", primal.path]


def _tensors(model: nn.Module, primals: tuple[Primal, ...]) -> list[dict[str, Any]]:
    """Return every entry of the model's state dict, then what else the step reads, with its values."""
    rows: list[dict[str, Any]] = []
    first: dict[int, str] = {}
    saved = model.state_dict(keep_vars=True)
    for path, t in saved.items():
        row = {"path": path, "geometry": Geometry.of(t).json()}
        row["kind"] = "parameter" if isinstance(t, nn.Parameter) else "buffer"
        if isinstance(t, nn.Parameter) and t.requires_grad:
            row["kind"] = "trained"
        if id(t) in first:
            row["same_as"] = first[id(t)]
        rows.append(row)
        first.setdefault(id(t), path)
    named = dict(model.named_buffers())
    size = 0
    for p in primals:
        if p.kind not in (StorageKind.BUFFER, StorageKind.CONSTANT) or p.path in saved:
            continue
        value = p.value if p.value is not None else named[p.path]
        size += value.numel() * value.element_size()
        need(size <= MOST_CONSTANT_BYTES, f"constants of more than {MOST_CONSTANT_BYTES} bytes, {p.path!r} among them")
        rows.append({"path": p.path, "kind": "constant", "geometry": Geometry.of(value).json(), "value": _text(value)})
    return rows


def _text(value: Tensor) -> str:
    """Return the bytes of a tensor's elements in row-major order, in base64."""
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return base64.b64encode(flat.numpy().tobytes()).decode()
