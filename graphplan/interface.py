"""Interface: what goes in and out of a joint graph, read off AOTAutograd's descriptors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

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

from graphplan.errors import CaptureError
from graphplan.graph import Output, Primal, StorageKind
from graphplan.state import lookup


class Interface:
    """Inputs, outputs, buffer updates and gradients of a joint graph, as fx nodes.

    `traced` is what was exported; it holds `model` under `prefix`.
    """

    def __init__(self, joint: Any, model: nn.Module, traced: nn.Module, prefix: str) -> None:
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
            self.primals.append((_primal(desc, model, traced, prefix), node))
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
                    raise CaptureError(_changed(self.primals[self.by_desc[desc.mutated_input]][0]))
                self._mutate(self.by_desc[desc.mutated_input], node)
            elif isinstance(desc, PlainAOTOutput):
                plain.append(node)
                tangents.append(tangent_of.get(desc))
            elif isinstance(desc, IntermediateBaseAOTOutput):
                bases.append(self._forward_output(node, tangent_of.get(desc)))
            elif isinstance(desc, GradAOTOutput) and node is not None:
                self.gradients[self.by_desc[desc.grad_of]] = node
        for i, node in enumerate(plain):
            made = self._output(self.info[i], node, tangents[i], bases, plain, tangents)
            self.outputs.append(replace(made, detached=not self.info[i].requires_grad))

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
        self,
        info: Any,
        node: Any,
        tangent: fx.Node | None,
        bases: list[int],
        plain: list[Any],
        tangents: list[Any],
    ) -> Output:
        if not isinstance(node, fx.Node):
            raise CaptureError(f"the model returns {node!r}, which is not a tensor of the graph")
        from torch._functorch._aot_autograd.schemas import OutputType  # see `capture._joint`

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

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let `new` stand for `old` among the results."""
        self.gradients = [new if n is old else n for n in self.gradients]
        self.forward_outputs = [new if n is old else n for n in self.forward_outputs]
        self.mutations = [(i, new if n is old else n) for i, n in self.mutations]

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


def _changed(primal: Primal) -> str:
    """Return why what requires grad must not be changed by the forward."""
    if primal.kind is StorageKind.INPUT:
        return f"the forward changes input {primal.index}, which requires grad, in place: change a clone of it"
    return (
        f"the forward changes parameter {primal.path!r}, which is trained, in place (a clamp, a renormalisation, the "
        "max_norm of an Embedding): do it after optimizer.step()"
    )


def _primal(desc: Any, model: nn.Module, traced: nn.Module, prefix: str) -> Primal:
    if isinstance(desc, PlainAOTInput):
        return Primal(StorageKind.INPUT, str(desc.idx), desc.idx)
    if not isinstance(desc, ParamAOTInput | BufferAOTInput):
        raise CaptureError(
            f"the graph has an input of an unknown kind ({desc}): the model runs an op with side effects (a print; the "
            "error checks of torch.linalg: use cholesky_ex, inv_ex, solve_ex), or its inputs share memory; neither can "
            "be planned"
        )
    kind = StorageKind.PARAMETER if isinstance(desc, ParamAOTInput) else StorageKind.BUFFER
    path = desc.target.removeprefix(prefix)
    value = resolve(model, path)
    if path != desc.target and value is not None:
        return Primal(kind, path, hooked=bool(value._backward_hooks))
    return Primal(StorageKind.CONSTANT, path, value=resolve(traced, desc.target))


def resolve(model: nn.Module, path: str) -> Tensor | None:
    """Return the parameter, buffer or plain tensor attribute at the dotted `path`, None if there is none."""
    return lookup(model)(path)


def _geometry(node: fx.Node, base: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Return (size, stride, offset from the base's own) of a view."""
    val = node.meta["val"]
    return (
        tuple(val.shape),
        tuple(val.stride()),
        int(val.storage_offset()) - int(base.meta["val"].storage_offset()),
    )
