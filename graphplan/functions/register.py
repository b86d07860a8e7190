"""Functions as ops of `torch.ops.graphplan`, each with a schema and a fake kernel.

So a planned graph can be propagated with fake tensors, checked and traced like any other. `registered` is for
functions of their own; `derived` for a form of an ATen op, whose schema follows from that op's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch

Function = Callable[..., Any]
NAMESPACE = "graphplan"
_LIBRARY: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_DERIVED: dict[str, torch._ops.OpOverload] = {}
_LOCK = Lock()  # a name can be defined once in a process


def registered(
    schema: str, fake: Function, tags: Sequence[torch.Tag] = ()
) -> Callable[[Function], torch._ops.OpOverload]:
    """Make the decorated function the op of its name; `fake` makes its result without reading values.

    Not by `torch.library.custom_op`, whose layers of Python take as long again as the call of a small kernel.
    """

    def wrap(function: Function) -> torch._ops.OpOverload:
        def run(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():  # what is encoded has no derivative
                return function(*args)

        name = function.__name__
        _define(f"{name}{schema}", run, fake, tags)
        op: torch._ops.OpOverload = getattr(torch.ops.graphplan, name).default
        return op

    return wrap


def derived(
    of: torch._ops.OpOverload,
    argument: int,
    suffix: str,
    instead: str,
    function: Function,
    fake: Function,
    over: int | None = None,
) -> torch._ops.OpOverload:
    """Return the op like `of` that takes the arguments `instead` in place of argument `argument`, before the others.

    With `over` it writes its one result over that argument. Made once for each name.
    """
    own = of._schema.arguments
    packet, overload = name_of(of, own[argument].name, suffix), "default" if over is None else f"over_{own[over].name}"
    texts = [_text("f", [a], []).removeprefix("f(").removesuffix(") -> ()") for a in own]
    returns = _text("f", [], of._schema.returns).split(" -> ")[1]
    if over is not None:
        texts[over] = texts[over].replace("Tensor ", "Tensor(a!) ", 1)
        returns = "Tensor(a!)"
    others = [t for i, t in enumerate(texts) if i != argument]
    name = packet if over is None else f"{packet}.{overload}"
    with _LOCK:
        if name not in _DERIVED:
            _define(f"{name}({', '.join([instead, *others])}) -> {returns}", function, fake)
            _DERIVED[name] = getattr(getattr(torch.ops.graphplan, packet), overload)
    return _DERIVED[name]


def _define(schema: str, function: Function, fake: Function, tags: Sequence[torch.Tag] = ()) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


def name_of(of: torch._ops.OpOverload, argument: str, suffix: str) -> str:
    """Return e.g. "ge_Scalar_self_from_sides"."""
    parts = [*of._schema.name.removeprefix("aten::").split("::"), of._schema.overload_name, argument, suffix]
    return "_".join(p for p in parts if p)


def _text(name: str, arguments: Sequence[Any], returns: Sequence[Any]) -> str:
    return str(torch._C.FunctionSchema(name, "", list(arguments), list(returns), False, False))
