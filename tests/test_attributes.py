"""What a forward keeps on the model: a trace leaves nothing of its own there."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import graphplan


class Keeping(nn.Module):
    """Keeps a tensor of its last forward, counts calls, and makes a table when it first needs one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 8), 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.table = torch.arange(8.0)
        self.calls += 1
        y = self.layer(x) + self.table
        self.last = y.detach()
        return y.sin()


def test_a_trace_leaves_no_attributes() -> None:
    model, x = Keeping(), torch.randn(4, 8)
    planned = graphplan.optimize(model, "100%", x, time_limit=2)
    assert model.last is None
    assert model.calls == 0
    assert not hasattr(model, "table")
    copy.deepcopy(model)
    expected = model(x)
    assert torch.equal(planned(x), expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graphplan.train_step(model, lambda y: y.sum(), optimizer, "100%", x, time_limit=2)(x)
    assert model.calls == 1
    assert torch.equal(copy.deepcopy(model).last, model.last)
