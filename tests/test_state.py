"""What is read of a model at every call: the same as before means the same plan, and no change goes unseen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import graphplan
from graphplan.state import ModelState


def made() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Sequential(nn.Linear(16, 4)))


def put(model: nn.Sequential, index: int, module: nn.Module) -> None:
    model[index] = module


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "mode": lambda m: m[1].eval(),
    "frozen": lambda m: m[0].weight.requires_grad_(False),
    "dtype": lambda m: m[0].double(),
    "number": lambda m: setattr(m[2], "p", 0.25),
    "number of none": lambda m: setattr(m[1], "momentum", None),
    "module replaced": lambda m: put(m, 0, nn.Linear(8, 16, bias=False)),
    "inner module replaced": lambda m: put(m[3], 0, nn.Tanh()),
    "module gone": lambda m: m.pop(2),
    "forward hook": lambda m: m[2].register_forward_hook(lambda module, inputs, output: 2 * output),
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    model = made()
    state = ModelState(model)
    before = state.read(model)
    assert state.read(model) is before
    CHANGES[name](model)
    after = state.read(model)
    assert after != before
    assert state.read(model) is after


def test_a_change_taken_back_is_the_same_state() -> None:
    model = made()
    state = ModelState(model)
    before = state.read(model)
    model.eval()
    assert state.read(model) != before
    model.train()
    assert state.read(model) == before
    assert hash(state.read(model)) == hash(before)


def test_a_number_where_there_was_none_is_seen() -> None:
    model = made()
    model[1].momentum = None
    state = ModelState(model)
    before = state.read(model)
    model[1].momentum = 0.1
    assert state.read(model) != before


def test_a_number_that_becomes_a_tensor_or_goes_is_seen_too() -> None:
    model = made()
    state = ModelState(model)
    before = state.read(model)
    model[2].p = torch.tensor([0.1, 0.2])
    assert state.read(model) != before
    model[2].p = 0.5
    again = state.read(model)
    del model[1].eps
    assert state.read(model) != again


def test_tensors_are_found_where_they_are_now() -> None:
    model = made()
    state = ModelState(model)
    state.read(model)
    assert state.find("0.weight") is model[0].weight
    model[0].weight = nn.Parameter(torch.zeros(16, 8))
    state.read(model)
    assert state.find("0.weight") is model[0].weight
    put(model[3], 0, nn.Linear(16, 4))
    state.read(model)
    assert state.find("3.0.weight") is model[3][0].weight
    assert state.find("3.0.running_mean") is None
    assert state.find("1.running_mean") is model[1].running_mean


def test_a_step_trains_the_parameters_that_the_model_has_now() -> None:
    model, other = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)), nn.Linear(8, 2)
    x, y = torch.randn(4, 8), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(graphplan.UnsupportedOptimizer):
        graphplan.train_step(model, nn.functional.cross_entropy, optimizer, "100%", x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphplan.train_step(model, nn.functional.cross_entropy, optimizer, "100%", x, y)
    step(x, y)
    with torch.no_grad():
        model[2].weight = nn.Parameter(torch.zeros(2, 8))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    step(x, y)
    assert model[2].weight.abs().sum() > 0


def test_a_number_of_the_model_itself_counts() -> None:
    """Where the model is one of torch's own modules, a changed setting was not seen, and the old one ran on."""
    model, x = nn.LayerNorm(8), torch.randn(4, 8)
    planned = graphplan.optimize(model, "100%", x)
    assert torch.equal(planned(x), model(x))
    model.eps = 1.0
    assert torch.equal(planned(x), model(x))


class Bank(nn.Module):
    """Compares with what it remembers, of which the whole is replaced at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.register_buffer("bank", torch.randn(64, 512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        compared = h @ self.bank.clone().detach()
        with torch.no_grad():
            self.bank.copy_(torch.cat([h.detach().t(), self.bank[:, :-4]], 1))
        return compared


def test_buffers_take_their_new_values_before_the_loss() -> None:
    """The new values had been counted beside the loss: 7 to 20 % more was planned for than was held."""
    model, x = Bank(), torch.randn(4, 64)

    def loss_of(y: torch.Tensor) -> torch.Tensor:
        return (y[:, None] * torch.ones(8, 1)).square().mean()

    planned = graphplan.optimize(model, "100%", x, loss_fn=loss_of, time_limit=2)
    peak = graphplan.measure(planned, x, loss_of, runs=1).peak_bytes
    assert 0.99 * planned.plan.peak_bytes <= peak <= planned.plan.peak_bytes
    graphplan.verify(planned, model, (x,), loss_fn=loss_of)
    steps = planned.plan.steps
    assert steps.index("copy_buffers") < steps.index("turn")


def test_a_plan_that_never_copies_buffers_is_refused() -> None:
    model, x = Bank(), torch.randn(4, 64)
    plan = graphplan.optimize(model, "100%", x, time_limit=2).plan
    old = replace(plan, steps=tuple(s for s in plan.steps if s != "copy_buffers"))
    with pytest.raises(graphplan.PlanMismatch, match="copy_buffers"):
        graphplan.apply(model, old, x)(x)
