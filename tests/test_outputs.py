"""Outputs of every kind: views of one tensor, in any order."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import graphplan


class ViewsOfOne(nn.Module):
    """Returns a tensor, then two views of another that is no output itself: its gradient comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        z, h = self.a(x).sin(), self.b(x).cos()
        return z, h.t(), h.view(2, 3, 6)


def test_views_of_a_tensor_that_is_no_output_itself() -> None:
    """Their gradients had changed places with other outputs': errors, or wrong gradients where shapes were equal."""
    model, x = ViewsOfOne(), torch.randn(6, 6)

    def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
        z, turned, cut = outputs
        return (z * 3).sum() + (turned * turned).sum() + cut.exp().sum()

    planned = graphplan.optimize(model, "100%", x, loss_fn=loss_of)
    loss_of(model(x)).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    loss_of(planned(x)).backward()
    assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters())


class TwoHeads(nn.Module):
    """Two outputs of one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x).tanh()
        return self.a(h), self.b(h)


def test_what_the_loss_does_not_read_gives_no_gradient() -> None:
    """As in plain PyTorch: where it were zero, weight decay and momentum would move the parameter."""
    model, x = TwoHeads(), torch.randn(4, 6)
    plain = copy.deepcopy(model)
    planned = graphplan.optimize(model, "100%", x, time_limit=2)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m in (model, plain)]
    for read in ((0,), (1,), (0, 1), (0,)):
        for net, optimizer in zip((planned, plain), optimizers, strict=True):
            optimizer.zero_grad()
            outputs = net(x)
            sum(outputs[i].square().sum() for i in read).backward()
            optimizer.step()
        none = [[p.grad is None for p in m.parameters()] for m in (model, plain)]
        assert none[0] == none[1]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
