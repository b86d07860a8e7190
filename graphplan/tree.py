"""Tensors in and out of any Python structure: lists, dicts, dataclasses, and objects that hold tensors.

torch's own pytree stops at classes that nobody registered (plain dataclasses, key-value caches). A Template
keeps one sample of the structure with every tensor replaced by a numbered Slot, and builds fresh copies of it.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from graphplan.errors import CaptureError

_VALUES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    type,
    range,
)


def arguments(inputs: Any, kwargs: Mapping[str, Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a model is called with: of a tensor (one argument), a tuple, a mapping (by keyword) or None."""
    given = dict(kwargs or {})
    if isinstance(inputs, Mapping):
        return (), {**inputs, **given}
    if inputs is None:
        return (), given
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), given


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Where tensor `index` of a structure goes."""

    index: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        """Never copied: `Template.fill` finds slots by identity."""
        return self


@dataclass(frozen=True, slots=True)
class Template:
    """One structure with its tensors taken out."""

    shape: Any  # the structure, a Slot in the place of each distinct tensor
    slots: tuple[Slot, ...]

    @staticmethod
    def of(structure: Any) -> tuple[Template, list[Tensor]]:
        """Return the template of `structure` and its distinct tensors, in order of appearance.

        Raises:
            CaptureError: it cannot be copied, or not without its tensors.
        """
        tensors = list(_tensors(structure, set()))
        slots = tuple(Slot(i) for i in range(len(tensors)))
        memo: dict[int, Any] = {id(t): s for t, s in zip(tensors, slots, strict=True)}
        try:
            return Template(copy.deepcopy(structure, memo), slots), tensors
        except (AttributeError, RuntimeError, TypeError) as e:
            others = ", ".join(dict.fromkeys(_others(structure)))
            raise CaptureError(
                f"the model takes or returns {others}, which cannot be copied with its tensors taken out: pass and "
                "return tensors in tuples, lists, dicts, dataclasses, or objects that have them as attributes"
            ) from e

    def fill(self, tensors: Sequence[Any]) -> Any:
        """Return a fresh copy of the structure with `tensors` in its slots."""
        return _fill(self.shape, tensors)

    def key(self) -> Hashable:
        """Return what two structures must share to be captured once: nesting, slot order, plain values."""
        return _key(self.shape)


def _others(node: Any) -> Iterator[str]:
    """Yield the type of each object in plain containers that is neither a tensor nor a plain value."""
    if type(node) in (tuple, list, dict, deque):
        for child in _children(node):
            yield from _others(child)
    elif not isinstance(node, (*_VALUES, Tensor)):
        yield type(node).__name__


def path_to(structure: Any, wanted: tuple[type, ...]) -> str | None:
    """Return where the first object of these types is in nested containers and attributes, None if there is none."""
    if isinstance(structure, wanted):
        return ""
    children: list[tuple[str, Any]] = []
    if isinstance(structure, Mapping):
        children = [(f"[{key!r}]", value) for key, value in structure.items()]
    elif isinstance(structure, list | tuple | deque):
        children = [(f"[{i}]", value) for i, value in enumerate(structure)]
    elif is_dataclass(structure):
        children = [(f".{field.name}", getattr(structure, field.name)) for field in fields(structure)]
    for name, child in children:
        found = path_to(child, wanted)
        if found is not None:
            return name + found
    return None


def _fill(shape: Any, tensors: Sequence[Any]) -> Any:
    """Build plain containers directly; leave every other object to deepcopy."""
    if isinstance(shape, Slot):
        return tensors[shape.index]
    if type(shape) in (tuple, list):
        return type(shape)(_fill(s, tensors) for s in shape)
    if type(shape) is dict:
        return {k: _fill(s, tensors) for k, s in shape.items()}
    if isinstance(shape, _VALUES):
        return shape
    # deepcopy asks the memo first, so it answers with our tensor wherever it meets a Slot.
    return copy.deepcopy(shape, {id(s): tensors[s.index] for s in _slots(shape, set())})


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        yield from node.values()
    elif isinstance(node, list | tuple | set | frozenset | deque):
        yield from node
    if hasattr(node, "__dict__") and not isinstance(node, type | torch.nn.Module):
        yield from vars(node).values()
    for cls in type(node).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(node, name) and name not in ("__dict__", "__weakref__"):
                yield getattr(node, name)


def _walk(node: Any, wanted: type, seen: set[int]) -> Iterator[Any]:
    if isinstance(node, _VALUES) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, wanted):
        yield node
        return
    if callable(node) and not hasattr(node, "__dict__"):
        return
    for child in _children(node):
        yield from _walk(child, wanted, seen)


def _tensors(node: Any, seen: set[int]) -> Iterator[Tensor]:
    return _walk(node, Tensor, seen)


def _slots(node: Any, seen: set[int]) -> Iterator[Slot]:
    return _walk(node, Slot, seen)


def _key(shape: Any) -> Hashable:
    if isinstance(shape, Slot):
        return ("slot", shape.index)
    if isinstance(shape, _VALUES):
        return (type(shape), shape)
    if isinstance(shape, dict):
        return (type(shape), tuple((k, _key(v)) for k, v in shape.items()))
    if isinstance(shape, list | tuple):
        return (type(shape), tuple(_key(v) for v in shape))
    state = vars(shape) if hasattr(shape, "__dict__") else None
    if state is None:
        return (type(shape), repr(shape))
    return (type(shape), tuple((k, _key(v)) for k, v in state.items()))
