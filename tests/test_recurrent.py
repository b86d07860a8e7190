"""Recurrent layers with dropout between them: the plain model's numbers and its random stream."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

import graphplan

KINDS = list(product([nn.RNN, nn.LSTM, nn.GRU], [False, True], [False, True]))


@pytest.mark.parametrize(
    ("layer", "bidirectional", "batch_first"),
    [pytest.param(*kind, marks=() if i in (0, 6, 11) else pytest.mark.slow) for i, kind in enumerate(KINDS)],
)
def test_dropout_between_layers(layer: type[nn.RNNBase], bidirectional: bool, batch_first: bool) -> None:
    torch.manual_seed(0)
    model = layer(8, 16, 3, dropout=0.4, bidirectional=bidirectional, batch_first=batch_first)
    x = torch.randn(4, 6, 8)
    planned = graphplan.optimize(model, "100%", (x,), time_limit=2)
    torch.manual_seed(1)
    expected, _ = model(x)
    stream = torch.get_rng_state()
    torch.manual_seed(1)
    found, _ = planned(x)
    torch.testing.assert_close(found, expected)
    assert torch.equal(torch.get_rng_state(), stream)
    graphplan.verify(planned, model, (x,))
