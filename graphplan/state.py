"""What of a model its plans depend on, and where its tensors are: read at every call, so it has to be quick."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

Find = Callable[[str], Tensor | None]
_PLAIN = (bool, int, float, str, type(None))


class Key:
    """What a plan depends on, hashed once: it has thousands of parts, and every call asks for it."""

    __slots__ = ("_hash", "parts")

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        """Return the hash of the parts."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Compare the parts."""
        return self is other or (isinstance(other, Key) and self.parts == other.parts)


class ModelState:
    """A model as it is now. What was found at one call serves at the next where nothing has changed.

    `find(path)` returns the parameter, buffer or plain tensor attribute there, None if there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.find = lookup(model)
        self._model = model
        self._modules: list[nn.Module] = []
        self._read: list[Callable[[dict[str, Any]], Any]] = []
        self._key: Key | None = None

    def read(self, *owners: Any) -> Key:
        """Return what of the modules among `owners`, and of torch, a plan depends on: kernels' scratch does on threads.

        Of every module its kind, mode and hooks; of torch's own also their numbers, as a dropout's `p` (others' may
        count).
        """
        modules = [m for owner in owners if isinstance(owner, nn.Module) for m in _modules(owner)]
        if [id(m) for m in modules] != [id(m) for m in self._modules]:  # a module may have an == of its own
            self._modules, self._key, self.find = modules, None, lookup(self._model)
        try:
            parts = self._parts()
            if self._key is not None and parts == self._key.parts:
                return self._key
        except (KeyError, RuntimeError):  # an attribute has gone, or is a tensor now
            pass
        self._read = [_reader(m) for m in modules]
        self._key = Key(self._parts())
        return self._key

    def _parts(self) -> tuple[Any, ...]:
        modules = self._modules
        own = (p for m in modules for p in m._parameters.values() if p is not None)
        parameters = tuple([(p.shape, p.dtype, p.device, p.requires_grad) for p in own])
        kinds = tuple([type(m) for m in modules]), tuple([m.training for m in modules])
        numbers = tuple([read(m.__dict__) for read, m in zip(self._read, modules, strict=False)])
        # Hooks have numbers of their own in a process.
        hooks = tuple([(*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks) for m in modules])
        autocast = tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
        return (parameters, kinds, numbers, hooks, autocast, torch.get_num_threads())


def lookup(model: nn.Module) -> Find:
    """Return what finds the tensor at a dotted path, as long as the model's modules are the same ones."""
    owners: dict[str, nn.Module | None] = {"": model}
    places: dict[str, tuple[nn.Module | None, str]] = {}

    def owner_of(path: str) -> nn.Module | None:
        if path not in owners:
            parent, _, name = path.rpartition(".")
            above = owner_of(parent)
            owners[path] = None if above is None else above._modules.get(name)
        return owners[path]

    def find(path: str) -> Tensor | None:
        place = places.get(path)
        if place is None:
            parent, _, leaf = path.rpartition(".")
            place = places[path] = owner_of(parent), leaf
        owner, leaf = place
        value = None if owner is None else owner._parameters.get(leaf)
        if value is None:  # a buffer, a plain attribute, or what a parametrization computes
            value = getattr(owner, leaf, None)
        return value if isinstance(value, Tensor) else None

    return find


def _modules(owner: nn.Module) -> list[nn.Module]:
    """Return a module and all that are in it, each once: `modules()` without its names, which take most of its time."""
    found = {id(owner): owner}
    waiting = [owner]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def _reader(module: nn.Module) -> Callable[[dict[str, Any]], Any]:
    """Return what reads a module's numbers from its attributes."""
    torchs = type(module).__module__.startswith("torch.nn.")
    names = [n for n, v in vars(module).items() if type(v) in _PLAIN] if torchs else []
    return itemgetter(*names) if names else _nothing


def _nothing(attributes: dict[str, Any]) -> None:
    """Read nothing."""
