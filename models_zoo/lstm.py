"""An LSTM language model whose cells are linear layers and whose steps are unrolled in Python."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from models_zoo.entry import Example, generator


class LSTMCell(nn.Module):
    """One step of one layer, x [N, inputs] and state h, c [N, hidden] to the next h and c [N, hidden]."""

    def __init__(self, inputs: int, hidden: int) -> None:
        """Make the two linear maps to all four gates."""
        super().__init__()
        self.from_input = nn.Linear(inputs, 4 * hidden)
        self.from_hidden = nn.Linear(hidden, 4 * hidden, bias=False)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Map x [N, inputs] and the state to the next hidden and cell state, each [N, hidden]."""
        hidden, cell = state
        gates: Tensor = self.from_input(x) + self.from_hidden(hidden)
        take, keep, candidate, give = gates.chunk(4, 1)
        cell = keep.sigmoid() * cell + take.sigmoid() * candidate.tanh()
        return give.sigmoid() * cell.tanh(), cell


class LSTMLanguageModel(nn.Module):
    """Stacked LSTM layers over tokens [N, T] of any length T, to logits [N, T, vocab]."""

    def __init__(self, *, vocab: int = 2000, embed: int = 256, hidden: int = 512, layers: int = 2) -> None:
        """Make the embedding, one cell for each layer and the head."""
        super().__init__()
        self.hidden = hidden
        self.embedding = nn.Embedding(vocab, embed)
        self.cells = nn.ModuleList(LSTMCell(embed if index == 0 else hidden, hidden) for index in range(layers))
        self.head = nn.Linear(hidden, vocab)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [N, T] to logits [N, T, vocab], from a state of zeros."""
        embedded: Tensor = self.embedding(tokens)
        zeros = embedded.new_zeros(tokens.shape[0], self.hidden)
        states = [(zeros, zeros) for _ in self.cells]
        outputs: list[Tensor] = []
        for x in embedded.unbind(1):
            for index, cell in enumerate(self.cells):
                states[index] = cell(x, states[index])
                x = states[index][0]
            outputs.append(x)
        logits: Tensor = self.head(torch.stack(outputs, 1))
        return logits


def next_token_batch(batch: int | None = None, seed: int = 0, *, default_batch: int, steps: int, vocab: int) -> Example:
    """Return tokens [batch, steps] with the tokens after them [batch, steps] as targets."""
    count = default_batch if batch is None else batch
    text = torch.randint(vocab, (count, steps + 1), generator=generator(seed))
    return Example((text[:, :-1].contiguous(),), text[:, 1:].contiguous())


def lstm() -> LSTMLanguageModel:
    """Return an LSTM language model of two layers of 512, tokens [N, T] to logits [N, T, 2000]."""
    return LSTMLanguageModel()


def lstm_small() -> LSTMLanguageModel:
    """Return an LSTM language model of two layers of 32, tokens [N, T] to logits [N, T, 64]."""
    return LSTMLanguageModel(vocab=64, embed=16, hidden=32)


lstm_example = partial(next_token_batch, default_batch=32, steps=64, vocab=2000)
lstm_example_small = partial(next_token_batch, default_batch=32, steps=8, vocab=64)
