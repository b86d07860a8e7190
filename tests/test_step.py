"""train_step does what the plain loop does: same bits after ten steps, within its budget, in every setting."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_semantics import Net
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import graphplan
from graphplan.step.train import TrainStep
from models_zoo import MODELS

X, Y = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=1e-3),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "maximize": lambda p: SGD(p, lr=1e-3, maximize=True),
    "sgd fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "sgd foreach": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, foreach=True),
    "adam": lambda p: Adam(p, lr=1e-2, weight_decay=1e-2),
    "amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True, maximize=True),
    "adam foreach": lambda p: Adam(p, lr=1e-2, foreach=True),
    "adamw": lambda p: AdamW(p, lr=1e-2),
    "adamw fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "tensor lr": lambda p: AdamW(p, lr=torch.tensor(1e-2)),
}


def twins(model: nn.Module, build: Callable[[Any], Optimizer]) -> tuple[nn.Module, Optimizer, nn.Module, Optimizer]:
    other = copy.deepcopy(model)
    return model, build(model.parameters()), other, build(other.parameters())


def plain(model: nn.Module, optimizer: Optimizer, inputs: Any, targets: Any, loss_fn: Any = F.cross_entropy) -> Tensor:
    optimizer.zero_grad()
    loss = loss_fn(model(*inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.detach()


def same(model: nn.Module, optimizer: Optimizer, other: nn.Module, its: Optimizer) -> None:
    """Every parameter, buffer and tensor of optimizer state is equal to the bit."""
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    ours, theirs = optimizer.state_dict()["state"], its.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for i, own in ours.items():
        assert own.keys() == theirs[i].keys()
        for key, value in own.items():
            assert torch.equal(value, theirs[i][key]), (i, key)


@pytest.fixture
def to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the forms of a step out that round differently: where two fit, measured times choose."""
    forms = TrainStep._capture
    monkeypatch.setattr(TrainStep, "_capture", lambda *args: tuple(c for c in forms(*args) if not c.roomy)[:1])


def ten_steps(
    step: graphplan.TrainStep, other: nn.Module, its: Optimizer, inputs: Any, targets: Any, loss: Any
) -> None:
    for i in range(10):
        torch.manual_seed(i)
        ours = step(inputs, targets)
        torch.manual_seed(i)
        assert torch.equal(ours, plain(other, its, inputs, targets, loss))
    same(step.model, step.optimizer, other, its)


@pytest.mark.usefixtures("to_the_bit")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_equal_the_plain_loop(name: str) -> None:
    model, optimizer, other, its = twins(Net(), OPTIMIZERS[name])
    step = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", X, Y, time_limit=1)
    ten_steps(step.at_budget(step.plan.minimum_peak_bytes), other, its, (X,), Y, F.cross_entropy)


@pytest.mark.usefixtures("to_the_bit")
@pytest.mark.parametrize(("name", "kind"), zip(MODELS, itertools.cycle(["momentum", "adamw", "sgd"]), strict=False))
def test_zoo_at_the_least_budget(name: str, kind: str) -> None:
    entry = MODELS[name]
    model, optimizer, other, its = twins(entry.build_small(), OPTIMIZERS[kind])
    inputs, targets = entry.example_small().inputs, entry.example_small().targets
    full = graphplan.train_step(model, entry.loss, optimizer, "100%", inputs, targets, time_limit=2)
    step = full.at_budget(full.plan.minimum_peak_bytes)
    ten_steps(step, other, its, inputs, targets, entry.loss)
    measured = graphplan.measure(step, inputs, example_targets=targets, runs=1).peak_bytes
    assert measured <= step.plan.budget_bytes
    assert measured == pytest.approx(step.plan.peak_bytes, rel=0.01)


def test_large_parameters_are_updated_in_pieces() -> None:
    """Temporaries of an update stay small beside the parameter, and its bits stay the same."""
    for build in (OPTIMIZERS["adam"], OPTIMIZERS["nesterov"]):
        model, optimizer, other, its = twins(nn.Linear(1031, 1021), build)
        x, y = torch.randn(4, 1031), torch.randn(4, 1021)
        step = graphplan.train_step(model, F.mse_loss, optimizer, "100%", x, y)
        ten_steps(step, other, its, (x,), y, F.mse_loss)
        problem = step.entry().prepared.problem
        update = next(op for op in problem.ops if op.name == "update_weight")
        assert update.workspace_bytes < model.weight.numel() * 4


def test_groups_schedules_and_state_dicts() -> None:
    def build(model: nn.Module) -> Optimizer:
        head = [p for n, p in model.named_parameters() if n.startswith("head")]
        rest = [p for n, p in model.named_parameters() if not n.startswith("head")]
        return SGD([{"params": head, "lr": 0.2, "momentum": 0.9}, {"params": rest, "weight_decay": 0.01}], lr=0.1)

    model = Net()
    other = copy.deepcopy(model)
    optimizer, its = build(model), build(other)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=12) for o in (optimizer, its)]
    step = graphplan.train_step(model, F.cross_entropy, optimizer, "80%", X, Y)
    for i in range(8):
        if i == 4:  # both ways: ours goes on from theirs, theirs from ours
            ours, theirs = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(its.state_dict())
            optimizer.load_state_dict(theirs)
            its.load_state_dict(ours)
        torch.manual_seed(i)
        step((X,), Y)
        torch.manual_seed(i)
        plain(other, its, (X,), Y)
        for s in schedules:
            s.step()
    same(model, optimizer, other, its)
    assert len(step._planner.entries) == 1


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_a_state_that_was_looked_at_before_it_began(kind: str) -> None:
    """`optimizer.state` makes an empty entry for whoever asks; what the updates begin must be kept all the same."""
    model, optimizer, other, its = twins(nn.Linear(16, 3), OPTIMIZERS[kind])
    step = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", X, Y)
    assert all(not optimizer.state[p] for p in model.parameters())
    for _ in range(3):
        assert torch.equal(step(X, Y), plain(other, its, (X,), Y))
    same(model, optimizer, other, its)


def test_changed_groups_are_planned_again() -> None:
    model, optimizer, other, its = twins(Net(), lambda p: SGD(list(p)[:4], lr=0.1))
    step = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", X, Y)
    step(X, Y)
    torch.manual_seed(0)
    for o, m in ((optimizer, model), (its, other)):
        o.add_param_group({"params": list(m.parameters())[4:], "momentum": 0.5})
    other.load_state_dict(model.state_dict())
    step = step.at_budget("100%")
    ten_steps(step, other, its, (X,), Y, F.cross_entropy)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.frozen(self.embed(tokens)))).transpose(1, 2)


@pytest.mark.usefixtures("to_the_bit")
def test_tied_and_frozen_parameters() -> None:
    tokens = torch.arange(24).view(2, 12)
    model, optimizer, other, its = twins(Tied(), OPTIMIZERS["momentum"])
    step = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", tokens, tokens)
    updates = [s for s in step.plan.steps if s.startswith("update_")]
    assert updates == ["update_embed_weight"]
    assert model.frozen.weight.grad is None
    ten_steps(step.at_budget(step.plan.minimum_peak_bytes), other, its, (tokens,), tokens, F.cross_entropy)


def test_gradients_can_be_kept() -> None:
    model, optimizer, other, its = twins(Net(), OPTIMIZERS["sgd"])
    bare = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", X, Y)
    step = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", X, Y, keep_grads=["head.weight"])
    every = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", X, Y, keep_grads=True)
    torch.manual_seed(0)
    step(X, Y)
    torch.manual_seed(0)
    plain(other, its, (X,), Y)
    assert torch.equal(model.head.weight.grad, other.head.weight.grad)
    assert model.head.bias.grad is None
    assert bare.plan.minimum_peak_bytes < every.plan.minimum_peak_bytes
    every(X, Y)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("bound", [{"clip_value": 1e-3}, {"clip_norm": 1e-2}])
def test_clipping(bound: dict[str, float]) -> None:
    model, optimizer, other, its = twins(Net(), OPTIMIZERS["adam"])
    step = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", X, Y, **bound)
    free = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", X, Y)
    for i in range(5):
        torch.manual_seed(i)
        step(X, Y)
        torch.manual_seed(i)
        its.zero_grad()
        F.cross_entropy(other(X), Y).backward()
        if "clip_value" in bound:
            torch.nn.utils.clip_grad_value_(other.parameters(), bound["clip_value"])
        else:
            torch.nn.utils.clip_grad_norm_(other.parameters(), bound["clip_norm"])
        its.step()
    same(model, optimizer, other, its)
    if "clip_value" in bound:
        assert step.plan.minimum_peak_bytes <= free.plan.minimum_peak_bytes + 64
    else:
        assert step.plan.minimum_peak_bytes > free.plan.minimum_peak_bytes


def test_autocast_keeps_float32_parameters() -> None:
    layers = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 3))
    model, optimizer, other, its = twins(layers, OPTIMIZERS["sgd"])
    with torch.autocast("cpu", torch.bfloat16):
        step = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", X, Y)
    for _ in range(
        10
    ):  # a context of its own for each step: autocast keeps its copies of the weights to the end of one
        with torch.autocast("cpu", torch.bfloat16):
            ours = step(X, Y)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours, plain(other, its, (X,), Y))
    same(model, optimizer, other, its)
    assert model[0].weight.dtype is torch.float32
    assert any("bfloat16" in str(n.kwargs) for n in step.graph_module.graph.nodes)
    with pytest.raises(graphplan.GraphplanError, match="GradScaler"), torch.autocast("cpu", torch.float16):
        step(X, Y)


def test_verify_pareto_and_saved_plans(tmp_path: Any) -> None:
    model = Net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    plans = graphplan.pareto(
        model, X, points=3, loss_fn=F.cross_entropy, example_targets=Y, optimizer=optimizer, time_limit=2
    )
    plans[0].save(tmp_path / "plan.json")
    plan = graphplan.Plan.load(tmp_path / "plan.json")
    assert plan.update == "sgd"
    assert "applying gradients where they are final" in str(plan)
    step = graphplan.apply(model, plan, X, loss_fn=F.cross_entropy, example_targets=Y, optimizer=optimizer)
    assert graphplan.verify(step, model, X, example_targets=Y).ok
    with pytest.raises(graphplan.PlanMismatch, match="whole step with sgd"):
        graphplan.apply(model, plan, X)
    with pytest.raises(graphplan.PlanMismatch, match="graph"):
        graphplan.apply(
            model, plan, X, loss_fn=F.cross_entropy, example_targets=Y, optimizer=OPTIMIZERS["adam"](model.parameters())
        )


def test_infeasible_names_the_least() -> None:
    model = Net()
    with pytest.raises(graphplan.InfeasibleBudget) as caught:
        graphplan.train_step(model, F.cross_entropy, SGD(model.parameters(), lr=0.1), 1000, X, Y)
    step = graphplan.train_step(
        model, F.cross_entropy, SGD(model.parameters(), lr=0.1), caught.value.minimum_bytes, X, Y
    )
    assert step.plan.peak_bytes <= caught.value.minimum_bytes
