"""Values that tell: ops whose scratch memory hangs on an operand's values are profiled where it is largest, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

Values = dict[int, Callable[[Tensor], object]]  # what fills operands, by position


def _ones(t: Tensor) -> None:
    t.fill_(1)


def _of_many_norms(t: Tensor) -> None:
    """Fill matrices with norms that need scaling, a third with one, the others with growing ones.

    Those of each power of two are squared apart, and what was squared is held: gradients of exponentials are such.
    """
    matrices = t.flatten(0, -3) if t.dim() > 2 else t[None]
    count = matrices.shape[0]
    exponents = (torch.arange(count, device=t.device) - count // 3).clamp(0, 20)
    t.copy_((8 * 2.0**exponents).view(-1, 1, 1).expand_as(matrices).reshape(t.shape))


# Elsewhere made-up values do: scratch hangs on shapes. Ops whose results' shapes hang on values are not captured.
TELLING: dict[Any, Values] = {
    # By the norm a polynomial, of higher degree in more temporaries, then squarings, each of those that need more.
    aten.linalg_matrix_exp.default: {0: _of_many_norms},
    # The bags' sizes: of empty ones, no gradient is gathered.
    aten._embedding_bag_backward.default: {4: _ones},
    aten._embedding_bag_dense_backward.default: {3: _ones},
}


def telling_values(form: fx.GraphModule) -> list[Values]:
    """Return, for each further run that tells the scratch of `form`, what fills its inputs, by their positions."""
    inputs = {node: i for i, node in enumerate(form.graph.find_nodes(op="placeholder"))}
    found = []
    for node in form.graph.nodes:
        values = TELLING.get(node.target, {}) if node.op == "call_function" else {}
        if values:
            found.append({inputs[node.args[i]]: fill for i, fill in values.items() if node.args[i] in inputs})
    return found


def with_values(made: list[Any], values: Values) -> list[Any]:
    """Return `made` with the tensors at the positions of `values` filled by these."""
    for i, fill in values.items():
        fill(made[i])
    return made
