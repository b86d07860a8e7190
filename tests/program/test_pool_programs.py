"""Programs whose pools keep packed indices: the same bits, and codes of nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_program import ROOM, Document, _call, _changed, _set, _text
from torch import Tensor, nn

import graphplan
from graphplan.choices import candidates_of
from graphplan.optimize import make_plan
from graphplan.program import ProgramError, read_program
from graphplan.step import extend
from graphplan.step.train import TrainStep

X, Y = torch.randn(4, 1, 16, 16), torch.arange(4)
BACK = "graphplan.max_pool2d_backward_from_codes"


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.max_pool2d(self.conv(x), 2).flatten(1))
        return out


def packed_step(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> TrainStep:
    monkeypatch.setattr(extend, "LEAST_BYTES", 1 << 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", X, Y, time_limit=1)
    sliced = candidates_of(model, step.source(X, Y), step.options)[1]
    plan = make_plan(sliced.prepared, sliced.least(step.options), step.options)
    found = graphplan.apply(model, plan, X, loss_fn=F.cross_entropy, example_targets=Y, optimizer=optimizer)
    assert isinstance(found, TrainStep)
    return found


def test_a_program_with_packed_indices_trains_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Pooled()
    weights = copy.deepcopy(model.state_dict())
    step = packed_step(model, monkeypatch)
    text = _text(step, X, Y)
    assert BACK in text
    program = read_program(text, ROOM)
    held = program.make_model()
    held.load_state_dict(weights)
    loaded = program.bind(held, torch.optim.SGD(held.parameters(), lr=0.1))
    for _ in range(3):
        assert torch.equal(loaded(X, Y), step(X, Y))


def _made_up(document: Document) -> None:
    """Codes that no pooling has packed."""
    codes = next(c for c in document["calls"] if c[0] == "getitem" and c[1][1] == 1)
    codes[0], codes[1] = "aten.full.default", [[64], 255]


@pytest.mark.parametrize(
    "change",
    [
        _set(BACK, 2, [4, 4, 8, 8]),
        _set(BACK, 2, [2, 4, 16, 16]),
        _set(BACK, 3, [4, 4]),
        _set(BACK, 4, [3, 3]),
        _set(BACK, 4, [1 << 40, 1 << 40]),
        _made_up,
    ],
)
def test_codes_of_another_pooling_are_refused(
    change: Callable[[Document], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    document: Document = json.loads(_text(packed_step(Pooled(), monkeypatch), X, Y))
    assert _call(document, BACK)
    with pytest.raises(ProgramError):
        read_program(_changed(document, change), ROOM).make_model()
