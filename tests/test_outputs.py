"""Outputs of every kind: views of one tensor, in any order."""

from __future__ import annotations

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
