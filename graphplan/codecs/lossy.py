"""Lossy codes of activations, read by backward ops alone: `functions.group` in 8, 4 or 2 bits, or bfloat16.

The decoded value never becomes the activation again: each backward reader has an instruction of its own that decodes,
runs the op and lets go. So no forward op can be recomputed from it, and its memory is that instruction's workspace.
What a reader decides by the activation (a ReLU's mask), it decides by exact bits that the encode packs beside the code.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from graphplan import functions
from graphplan.codecs.find import Target, backward_readers, packed, saved_nodes
from graphplan.codecs.from_codes import AGAIN, Coded, from_codes, subsets, sums_scores
from graphplan.codecs.readers import READERS
from graphplan.codecs.stand_in import packing, run_from, sides_of, undemanding
from graphplan.graph import Graph, GraphOp
from graphplan.in_place import operands_of
from graphplan.instructions import Emitter, Encoded, Instruction, Loss

aten = torch.ops.aten
REFERENCE = "int4"  # whose noise is replayed
LEAST_BYTES = 4096  # below are statistics and pooled features: little to gain, much to lose (GACT's issue 4)
# Steps, not slopes, of what they read: an error would move elements across them.
DECIDES = frozenset(
    (
        *(op for op, found in READERS.items() if any(r.side for r in found)),
        aten.hardswish_backward.default,
        aten.hardshrink_backward.default,
        aten.softshrink_backward.default,
        aten._prelu_kernel_backward.default,
        aten.rrelu_with_noise_backward.default,
        aten.sign.default,
        aten.sgn.default,
    )
)


@dataclass(frozen=True, slots=True)
class Coder:
    """`encode(x, *given, key, slot)`, and `decode(code, *known, size, stride, dtype)`."""

    encode: Target
    given: tuple[Any, ...]
    decode: Target
    known: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Lossy:
    """Rounds activations to `bits` an element; its noise is estimated and capped (`graphplan.noise`)."""

    name: str
    bits: int
    exact: bool = False

    def find(self, graph: Graph, first_id: int) -> tuple[list[Encoded], list[Instruction]]:
        """Return a code for every activation all of whose backward readers can do with it."""
        encoded: list[Encoded] = []
        made: list[Instruction] = []
        coded: dict[int, list[Coded]] = {}  # what each backward op can read from codes
        readers, operands = backward_readers(graph), operands_of(graph)
        for node, storage in saved_nodes(graph):
            if not codable(node, self.bits):
                continue
            asked = undemanding(graph, node, storage, readers[storage])
            spared = {op.id for op, _, _ in asked}
            wanting = [op for op in readers[storage] if op.id not in spared]
            if not wanting or not all(self._serves(graph, op, node, storage) for op in wanting):
                continue
            numel, id_ = node.meta["val"].numel(), first_id + len(encoded)
            nbytes, _ = self._coded(node)
            loss = Loss(REFERENCE, partial(self._error, node))
            code = replace(packed(id_, f"{node.name}__{self.name}", nbytes, storage, self.name), loss=loss)
            codes = [code]
            if asked:
                nbytes = len(sides_of(asked)) * functions.packed_bytes(numel)
                codes.append(packed(id_ + 1, f"{node.name}__{self.name}_mask", nbytes, storage, self.name))
                made.extend(run_from(graph, storage, asked, codes[1], operands, f"from_{self.name}"))
            encoded.extend(codes)
            made.append(self._encode(node, storage, codes, packing(sides_of(asked))))
            for op in wanting:
                coded.setdefault(op.id, []).append(self._from(node, storage, code))
        for op in graph.ops:
            sets = subsets(coded.get(op.id, []))
            made.extend(from_codes(graph, op, some, f"from_{self.name}", self.bits) for some in sets)
        return encoded, made

    def warm_up(self, graph: Graph) -> None:
        """Compile before anything is measured."""
        vals = [node.meta["val"] for node, _ in saved_nodes(graph) if codable(node, self.bits)]
        for dtype, device in {(v.dtype, v.device) for v in vals}:
            largest = max(v.numel() for v in vals if (v.dtype, v.device) == (dtype, device))
            functions.warm_up(largest, self.bits, dtype, device)

    def _serves(self, graph: Graph, op: GraphOp, node: fx.Node, storage: int) -> bool:
        """Return whether the backward `op` can run from the code."""
        return _can_do(graph, op, node, storage)

    def _coded(self, node: fx.Node) -> tuple[int, Coder]:
        """Return the bytes of the code of `node`, and what makes and reads it."""
        same = (self.bits,)
        return functions.quantised_bytes(node.meta["val"].numel(), self.bits), Coder(
            functions.quantise, same, functions.dequantise, same
        )

    def _error(self, node: fx.Node, x: torch.Tensor) -> float:
        """Return the mean square of what encoding x, of `node`, and decoding it changes."""
        _, coder = self._coded(node)
        code = coder.encode(x, *coder.given, 0, 0)
        back = coder.decode(code, *coder.known, x.shape, x.stride(), x.dtype)
        return float((back.float() - x.float()).square_().mean())

    def _encode(self, node: fx.Node, storage: int, codes: list[Encoded], sides: tuple[Any, ...]) -> Instruction:
        _, coder = self._coded(node)

        def emit(out: Emitter) -> None:
            args = (out.load(node), *coder.given, out.key(), storage)
            code = out.call(coder.encode, args, codes[0].name)
            out.store_encoded(codes[0].id, code)
            for mask in codes[1:]:
                out.store_encoded(mask.id, out.call(functions.pack_sides, (out.load(node), *sides), mask.name))

        writes = tuple(c.id for c in codes)
        return Instruction(codes[0].name, "encode", None, (storage,), writes, True, emit)

    def _from(self, node: fx.Node, storage: int, code: Encoded) -> Coded:
        val, (_, coder) = node.meta["val"], self._coded(node)
        like = (tuple(val.shape), tuple(val.stride()), val.dtype)

        def decode(out: Emitter, name: str) -> fx.Node:
            return out.call(coder.decode, (out.load_encoded(code.id), *coder.known, *like), name)

        return Coded(node, storage, code, decode)


def codable(node: fx.Node, bits: int) -> bool:
    """Return whether a code of `bits` an element makes the activation smaller, and is worth the noise."""
    val = node.meta["val"]
    item = node.args[1] if node.target is operator.getitem else 0
    small = val.numel() * val.element_size() < LEAST_BYTES
    float_ = val.dtype in (torch.float32, torch.bfloat16, torch.float16)
    # Further results of an op are its statistics.
    shrinks = 8 * val.element_size() > bits
    return bool(float_ and item == 0 and not small and shrinks and functions.is_dense(val))


def _can_do(graph: Graph, op: GraphOp, node: fx.Node, storage: int) -> bool:
    """Return whether `op` reads values of the activation, by views of it, as operands, and decides nothing by them."""
    target = op.node.target
    if not op.repeatable or target in DECIDES or (target not in AGAIN and sums_scores(target)):
        return False
    results = op.node.meta["val"]
    results = results if isinstance(results, tuple | list) else (results,)
    if any(isinstance(r, torch.Tensor) and not r.dtype.is_floating_point for r in results):
        return False
    # An attention's mask, of zeros and infinities.
    if any(isinstance(a, fx.Node) and storage in graph.storages_of[a.name] for a in op.node.kwargs.values()):
        return False
    return all(
        _is_view(graph, a, node, storage) for a in op.node.all_input_nodes if storage in graph.storages_of[a.name]
    )


def _is_view(graph: Graph, a: fx.Node, node: fx.Node, storage: int) -> bool:
    while a is not node:
        sources = [x for x in a.all_input_nodes if storage in graph.storages_of[x.name]]
        if len(sources) != 1 or set(graph.storages_of[a.name]) != {storage}:
            return False
        a = sources[0]
    return True


INT8, INT4, INT2 = Lossy("int8", 8), Lossy("int4", 4), Lossy("int2", 2)
BF16 = Lossy("bf16", functions.HALF)
