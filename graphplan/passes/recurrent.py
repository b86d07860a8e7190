"""Recurrent layers as they train: torch's trace of RNN, LSTM and GRU has them without dropout, and ready to infer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._decomp.decompositions as decompositions
from torch import Tensor


@contextlib.contextmanager
def recurrent_layers_that_train() -> Iterator[None]:
    """Trace layer by layer with the dropout that eager mode applies between them, LSTMs unrolled.

    `_rnn_helper` of torch 2.11 to 2.13 asks whether `num_layers < i - 1` before it drops anything, which never holds.
    An LSTM whose input requires no grad is traced as oneDNN's layer, as if for inference; that layer's backward reads
    an opaque workspace, and crashes on one that its forward did not write.
    """
    whole: Any = decompositions._rnn_helper
    select: Any = decompositions.select_one_layer_lstm_function

    def by_layer(
        x: Tensor,
        hidden: Sequence[Any],
        params: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
        layer: Callable[..., Any],
    ) -> tuple[Tensor, list[Any]]:
        x, final, each = x.transpose(0, 1) if batch_first else x, [], 2 if bidirectional else 1
        for i in range(num_layers):
            own = slice(each * i, each * (i + 1))
            x, ends = whole(x, hidden[own], params[own], has_biases, 1, 0.0, train, bidirectional, False, layer)
            final.extend(ends)
            if train and dropout and i < num_layers - 1:
                x = torch.dropout(x, dropout, train=True)
        return x.transpose(0, 1) if batch_first else x, final

    decompositions._rnn_helper = by_layer
    decompositions.select_one_layer_lstm_function = lambda *_: decompositions.one_layer_lstm
    try:
        yield
    finally:
        decompositions._rnn_helper, decompositions.select_one_layer_lstm_function = whole, select
