"""What proves that integers fit: ops that make small ones, ops that raise on large ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphplan.capture import capture
from graphplan.codecs import choose_codecs
from graphplan.codecs.narrow import BOUNDS, CHECKS
from graphplan.instructions import instructions_of

aten = torch.ops.aten
IMAGE, VOLUME, TABLE = (2, 3, 6, 7), (2, 3, 4, 5, 6), (40, 7)
SHARP = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, 1.0])

# op -> the shape of its input and its further arguments
MADE: dict[Any, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    aten.max_pool2d_with_indices.default: (IMAGE, ([3, 3], [1, 1], [1, 1])),
    aten.max_pool3d_with_indices.default: (VOLUME, ([2] * 3, [1] * 3, [1] * 3)),
    aten.adaptive_max_pool2d.default: (IMAGE, ([3, 4],)),
    aten.adaptive_max_pool3d.default: (VOLUME, ([3, 4, 2],)),
    aten.fractional_max_pool2d.default: (IMAGE, ([2, 2], [4, 4], torch.rand(2, 3, 2))),
    aten.fractional_max_pool3d.default: (VOLUME, ([2] * 3, [2] * 3, torch.rand(2, 3, 3))),
    aten.kthvalue.default: (TABLE, (3, 1)),
    aten.topk.default: (TABLE, (3, 1)),
    aten.sort.stable: (TABLE, ()),
    aten.multinomial.default: (TABLE, (5,)),
    aten.bucketize.Tensor: (TABLE, (torch.tensor([-1.0, 0.5, 1.0]),)),
    aten.searchsorted.Tensor: ((5,), (torch.randn(40),)),
    aten.mode.default: (TABLE, (1,)),
    **{
        op: (TABLE, (1,))
        for name in ("max", "min", "median", "nanmedian")
        for op in [getattr(aten, name).dim]
    },
    **{getattr(aten, name).default: (TABLE, (1,)) for name in ("cummax", "cummin", "sort", "argmax", "argmin")},
}  # fmt: skip


NAMED: dict[Any, dict[str, Any]] = {aten.sort.stable: {"stable": True, "dim": 0}}


def call_of(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Return the node that calls `op`, as a captured graph would hold it."""
    graph = fx.Graph()
    nodes = []
    for i, arg in enumerate(args):
        nodes.append(graph.placeholder(f"x{i}") if isinstance(arg, Tensor) else arg)
        if isinstance(arg, Tensor):
            nodes[-1].meta["val"] = arg.to("meta")
    return graph.call_function(op, tuple(nodes), kwargs)


def test_every_bound_has_an_example() -> None:
    assert set(MADE) == set(BOUNDS)
    assert set(CHECKED) == set(CHECKS)


@pytest.mark.parametrize("op", MADE, ids=str)
@pytest.mark.parametrize("sharp", [False, True])
def test_made_integers_lie_below_their_bound(op: Any, sharp: bool) -> None:
    shape, args = MADE[op]
    item, proof = BOUNDS[op]
    seen = set()
    for seed in range(30):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if op is aten.multinomial.default:
            x = x.abs()
        elif op is aten.searchsorted.Tensor:
            x = x.sort().values
        elif sharp:
            x[..., seed % shape[-1]] = SHARP[seed % 5]
        result = op(x, *args, **NAMED.get(op, {}))
        seen.update((result if item is None else result[item]).unique().tolist())
    bound = proof(call_of(op, x, *args, **NAMED.get(op, {})))
    assert set(range(bound)) >= seen
    assert {0, bound - 1} <= seen or sharp  # nor is it needlessly large


@pytest.mark.parametrize("op", [aten.argmax.default, aten.argmin.default])
def test_positions_in_a_whole_tensor(op: Any) -> None:
    assert BOUNDS[op][1](call_of(op, torch.randn(TABLE))) == 280
    assert BOUNDS[op][1](call_of(op, torch.randn(()))) == 1


X = torch.randn(6, 9)
# op -> a call of it with these integers
CHECKED: dict[Any, Callable[[Tensor], tuple[Any, ...]]] = {
    aten.embedding.default: lambda ids: (X, ids),
    aten.index_select.default: lambda ids: (X, 1, ids),
    aten.gather.default: lambda ids: (X, 0, ids[:, None]),
}


@pytest.mark.parametrize("op", CHECKED, ids=str)
def test_checking_ops_raise_on_anything_else(op: Any) -> None:
    bound = CHECKS[op][1](call_of(op, *CHECKED[op](torch.zeros(1, dtype=torch.int64))))
    op(*CHECKED[op](torch.arange(bound)))
    for wrong in (-1, bound, bound + 256):
        with pytest.raises((IndexError, RuntimeError)):
            op(*CHECKED[op](torch.tensor([0, wrong])))


class Looks(nn.Module):
    """Looks up the ids that `pick` leaves over, and uses all of them."""

    def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pick, self.table = pick, nn.Embedding(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.detach() * 100).long()
        return self.table(self.pick(ids).clamp(0, 19)).sum() + (x * ids).sum() + self.table(self.pick(ids) * 0).sum()


@pytest.mark.parametrize("pick", [lambda ids: ids[:4], lambda ids: ids + 1])
def test_a_part_that_was_checked_proves_nothing(pick: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(16, 2, requires_grad=True)
    graph = capture(Looks(pick), (x,)).graph
    found = {e.name for e in instructions_of(graph, choose_codecs("exact")).encoded}
    assert "_to_copy__narrow" not in found, found
