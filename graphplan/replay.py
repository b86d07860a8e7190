"""Replay: run the captured graph on a real batch, and again what one encoded activation changes in its backward.

An exact run keeps every value. To see what a lossy code does to the gradients, its readers run from the code, and then
only what depends on them, as long as it differs by a bit: for an activation that a weight's gradient alone reads, that
is one op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphplan.capture import Capture
from graphplan.graph import Graph, StorageKind
from graphplan.instructions import Instruction
from graphplan.runtime import bind, like_traced, output_of
from graphplan.state import lookup
from graphplan.tree import Template

Values = dict[fx.Node, Any]
TANGENT_SEED = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """A training batch: the model, its input tensors, and the caller's loss (None: see `tangents`)."""

    model: nn.Module
    tensors: Sequence[Tensor]
    loss_fn: Callable[..., Tensor] | None = None
    targets: Any = None
    samples: Tensor | None = None  # which of another batch's samples these are

    @property
    def size(self) -> int:
        """The number of samples: the first dimension of the first input that has one; 0 without any."""
        return next((t.shape[0] for t in self.tensors if t.dim()), 0)

    def of(self, samples: Tensor) -> Batch:
        """Return the batch of these of its samples, int64 (size,)."""
        known = samples if self.samples is None else self.samples[samples]
        tensors, picked = self._pick(self.tensors, samples), pick(self.targets, self.size, samples)
        return Batch(self.model, tensors, self.loss_fn, picked, known)

    def _pick(self, tensors: Sequence[Tensor], samples: Tensor) -> list[Tensor]:
        picked: list[Tensor] = pick(list(tensors), self.size, samples)
        return picked

    def primals(self, graph: Graph) -> list[Tensor]:
        """Return the graph's inputs; a copy of what the step changes."""
        find = lookup(self.model)
        found = [(p, bind(p, find, self.tensors).detach()) for p in graph.primals]
        return [t.clone() if p.mutated else t for p, t in found]

    def tangents(self, captured: Capture, outputs: Sequence[Tensor], primals: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient of the loss for each differentiable forward output.

        Without a loss function a scalar output is the loss; without one, normal noise stands for the gradient: rho,
        a ratio, depends on its size no more than on the loss's scale.
        """
        graph = captured.graph
        wanted = [t is not None for t in graph.tangents]
        if self.loss_fn is None:
            return [g for g, w in zip(self._made_up(outputs, wanted), wanted, strict=True) if w]
        with torch.enable_grad():
            fresh = [o.detach().requires_grad_(w) for o, w in zip(outputs, wanted, strict=True)]
            returned = captured.outputs.fill([output_of(o, fresh, primals) for o in graph.outputs])
            loss = self.loss_fn(returned) if self.targets is None else self.loss_fn(returned, self.targets)
            leaves = [f for f, w in zip(fresh, wanted, strict=True) if w]
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(f) if g is None else g for f, g in zip(leaves, found, strict=True)]

    def _made_up(self, outputs: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
        losses = [w and o.dim() == 0 for o, w in zip(outputs, wanted, strict=True)]
        if any(losses):
            return [torch.full_like(o, float(is_loss)) for o, is_loss in zip(outputs, losses, strict=True)]
        random = torch.Generator().manual_seed(TANGENT_SEED)
        drawn = [torch.randn(o.shape, generator=random).to(o) for o in outputs]
        return drawn if self.samples is None else self._pick(drawn, self.samples)


def pick(structure: Any, size: int, samples: Tensor) -> Any:
    """Return `structure` with `samples`, int64, of every tensor in it that has `size` of them, detached."""
    template, tensors = Template.of(structure)
    return template.fill([t.detach()[samples] if t.dim() and t.shape[0] == size else t for t in tensors])


class Tape:
    """Values of one run of a captured graph; `keep` holds on to all of them, else only gradients are left."""

    def __init__(self, captured: Capture, batch: Batch, *, keep: bool) -> None:
        """Run forward and backward once. Parameters, buffers, gradients and random streams are left as they are."""
        self.graph = graph = captured.graph
        self.values: Values = {}
        primals, nodes = batch.primals(graph), graph.nodes
        for primal, tensor in zip(graph.primals, primals, strict=True):
            self.values[nodes[primal.node]] = tensor
        self.early, self.late = _halves(graph)
        self.gradients = gradient_nodes(graph)
        results = {nodes[n] for n in graph.forward_outputs}
        dying = {} if keep else _last_reads([*self.early, *self.late], results | set(self.gradients.values()))
        devices = {t.device for t in primals if t.is_cuda}
        with torch.random.fork_rng(devices=devices), torch.no_grad(), torch._C._DisableAutocast():
            self._run(self.early, dying)
            outputs = [self.values[nodes[n]] for n in graph.forward_outputs]
            tangents = iter(batch.tangents(captured, outputs, primals))
            for name in graph.tangents:
                if name is not None:
                    self.values[nodes[name]] = like_traced(next(tangents), tuple(nodes[name].meta["val"].stride()))
            self._run(self.late, dying)

    def _run(self, nodes: Sequence[fx.Node], dying: dict[fx.Node, list[fx.Node]]) -> None:
        for node in nodes:
            self.values[node] = execute(node, self.graph, self.values.__getitem__)
            for dead in dying.get(node, ()):
                del self.values[dead]

    def gradient(self, name: str) -> Tensor:
        """Return the gradient of a parameter, as `real_parts`."""
        return real_parts(self.values[self.gradients[name]])


def real_parts(x: Tensor) -> Tensor:
    """Return a complex tensor as real and imaginary parts, any other as it is."""
    return torch.view_as_real(x) if x.is_complex() else x


def gradient_nodes(graph: Graph) -> dict[str, fx.Node]:
    """Return {parameter path: the node of its gradient}."""
    nodes, found = graph.nodes, dict[str, fx.Node]()
    for primal, name in zip(graph.primals, graph.gradients, strict=True):
        if name is not None and primal.kind is StorageKind.PARAMETER:
            found[primal.path] = nodes[name]
    return found


def execute(node: fx.Node, graph: Graph, load: Callable[[fx.Node], Any]) -> Any:
    """Return the value of one node; what writes over its first operand writes over a copy."""
    if node.op == "get_attr":
        return getattr(graph.module, str(node.target))
    target: Any = node.target
    args: list[Any] = [fx.map_arg(a, load) for a in node.args]
    if "graphplan_in_place" in node.meta:
        args[0] = args[0].clone()
    return target(*args, **fx.map_arg(node.kwargs, load))


def changed_gradients(tape: Tape, encode: Instruction, readers: Sequence[Instruction], key: int) -> dict[str, Tensor]:
    """Return the gradients that differ when `readers` run from what `encode` makes, under `key`."""
    again = _Again(tape, key)
    with torch.no_grad(), torch._C._DisableAutocast():
        encode.emit(again)
        again.backward({tape.graph.ops[r.op].node: r for r in readers if r.op is not None})
    return {name: real_parts(again.changed[n]) for name, n in tape.gradients.items() if n in again.changed}


def reader_errors(tape: Tape, encode: Instruction, readers: Sequence[Instruction], key: int) -> dict[str, float]:
    """Return the square of the error of each result that differs when `readers` run from what `encode` makes."""
    again = _Again(tape, key)
    with torch.no_grad(), torch._C._DisableAutocast():
        encode.emit(again)
        for reader in readers:
            reader.emit(again)
    return {n.name: _distance(value, tape.values[n]) for n, value in again.changed.items()}


class _Again:
    """The Emitter that executes: `changed` are the values that differ from the tape's."""

    takes_over = False

    def __init__(self, tape: Tape, key: int) -> None:
        self.tape, self.number = tape, key
        self.changed: Values = {}
        self.encoded: dict[int, Any] = {}

    def load(self, node: fx.Node) -> Any:
        return self.changed[node] if node in self.changed else self.tape.values[node]

    def load_encoded(self, storage: int) -> Any:
        return self.encoded[storage]

    def call(self, target: Callable[..., Any], args: tuple[Any, ...], name: str, kwargs: Any = None) -> Any:
        return target(*args, **(kwargs or {}))

    def copy(self, node: fx.Node, name: str) -> Any:
        return execute(node, self.tape.graph, self.load)

    def key(self) -> int:
        return self.number

    def store(self, node: fx.Node, value: Any) -> None:
        if not _same(value, self.tape.values[node]):
            self.changed[node] = value

    def store_encoded(self, storage: int, value: Any) -> None:
        self.encoded[storage] = value

    def backward(self, readers: dict[fx.Node, Instruction]) -> None:
        """Run the readers, and whatever reads something that changed, in order."""
        late = self.tape.late
        dying = _last_reads(late, set(self.tape.gradients.values()))
        for node in late:
            if node in readers:
                readers[node].emit(self)
            elif not any(a in self.changed for a in node.all_input_nodes):
                continue
            else:
                self.store(node, self.copy(node, node.name))
            for dead in dying.get(node, ()):
                self.changed.pop(dead, None)


def _distance(a: Any, b: Any) -> float:
    if isinstance(a, Tensor):
        number = a.is_floating_point() or a.is_complex()
        difference = real_parts(a - b) if number else (a != b).float()
        return float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
    return sum(_distance(x, y) for x, y in zip(a, b, strict=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _halves(graph: Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the nodes to execute before the tangents are known, and those after."""
    late = {op.node for op in graph.ops if op.backward}
    late.update(graph.nodes[t] for t in graph.tangents if t is not None)
    early = []
    for node in graph.module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node in late or any(a in late for a in node.all_input_nodes):
            late.add(node)
        else:
            early.append(node)
    return early, [n for n in graph.module.graph.nodes if n in late and n.op != "placeholder"]


def _last_reads(nodes: Sequence[fx.Node], keep: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Return {node: what nobody reads after it}, of `nodes` themselves."""
    last: dict[fx.Node, fx.Node] = {}
    own = set(nodes)
    for node in nodes:
        last[node] = node
        last.update((a, node) for a in node.all_input_nodes if a in own)
    found: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        if value not in keep:
            found.setdefault(reader, []).append(value)
    return found
