"""`torch.compile(model, backend="graphplan", options={"budget": "2GiB"})`: plan what Dynamo captures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphplan.errors import GraphplanError
from graphplan.planned import optimize


def graphplan_backend(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Return the planned step of one Dynamo graph; `options` are `optimize`'s keyword arguments.

    Each graph gets the whole budget, so use `fullgraph=True`: a model that breaks into several graphs would
    hold them together.

    Raises:
        GraphplanError: no budget among the options, or one that `optimize` does not know.
    """
    options = dict(options or {})
    if "budget" not in options:
        raise GraphplanError('torch.compile(..., backend="graphplan") needs options={"budget": ...}')
    known = set(optimize.__annotations__) - {"return", "model", "example_inputs", "example_kwargs"}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise GraphplanError(f"unknown option {unknown[0]!r}; choose from {', '.join(sorted(known))}")
    planned = optimize(graph_module, options.pop("budget"), **options)

    def run(*args: Any) -> Any:
        trainable = any(isinstance(a, Tensor) and a.requires_grad for a in args)
        return planned(*args) if trainable and torch.is_grad_enabled() else graph_module(*args)

    return run
