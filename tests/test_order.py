"""The order of ops: weight gradients in front of what they free, updates at once, the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphplan
from graphplan.capture import capture
from graphplan.passes import order
from graphplan.passes.order import reorder
from solvers import simulate, working_set


class Wide(nn.Module):
    """A block as in a transformer: what the inner layer saves is larger than its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 128), nn.Linear(128, 32)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.drop(nn.functional.gelu(self.inner(x))))


class Twice(Wide):
    """An op in it reads a view of a view, and then that view."""

    def forward(self, x: Tensor) -> Tensor:
        parts = nn.functional.gelu(self.inner(x)).view(-1, 32, 4)
        return x + self.outer((parts[:, :, 0].unsqueeze(2) + parts).flatten(1))


class Branches(nn.Module):
    """`sources[i]` says which earlier values layer i adds up, `kinds[i]` what it does with them."""

    def __init__(self, sources: list[list[int]], kinds: list[int]) -> None:
        super().__init__()
        self.sources, self.kinds = sources, kinds
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in sources)
        self.norm = nn.BatchNorm1d(8)
        self.wide = nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8)) for _ in sources)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for sources, kind, layer, wide in zip(self.sources, self.kinds, self.layers, self.wide, strict=True):
            total = sum(values[s % len(values)] for s in sources)
            made = (layer, torch.relu, self.norm, nn.functional.gelu, lambda v: nn.functional.dropout(v, 0.3), wide)
            values.append(made[kind](total))
        return sum(values[1:])


def test_weight_gradients_come_first_where_they_free_more() -> None:
    model = nn.Sequential(*(Wide() for _ in range(3)))
    graph = capture(model, (torch.randn(64, 32),)).graph
    graph.verify()
    written = {s: op for op in graph.ops for s in op.writes}
    by_path = {p.path: g for p, g in zip(graph.primals, graph.gradients, strict=True) if g is not None}
    param_of = {p.path: graph.storages_of[p.node][0] for p in graph.primals}
    for i in range(3):
        weight = written[graph.storages_of[by_path[f"{i}.outer.weight"]][0]]
        inputs = next(op for op in graph.ops if op.backward and param_of[f"{i}.outer.weight"] in op.reads)
        assert weight.id < inputs.id
    assert not reorder(graph)  # nothing is left to exchange


def test_views_of_views_stay_behind_what_they_view() -> None:
    model = nn.Sequential(Wide(), Twice(), Wide())
    graph = capture(model, (torch.randn(64, 32),)).graph
    graph.module.graph.lint()
    graph.verify()


def test_an_update_stands_where_its_gradient_is_final() -> None:
    model = nn.Sequential(*(Wide() for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = graphplan.train_step(model, nn.functional.mse_loss, optimizer, "100%", *torch.randn(2, 64, 32))
    graph = step.entry().prepared.graph
    place = {op.name: op.id for op in graph.ops}
    last = max(op.id for op in graph.ops if op.target == "aten.gelu_backward.default")
    for i in (1, 2):  # before anything of the first block is on its way
        assert place[f"update_{i}_outer_weight"] < place[f"update_{i}_inner_weight"] < last


class WideHead(nn.Module):
    """Images, and behind them a layer whose weight is far larger than all else."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.wide, self.head = nn.Linear(1024, 2048), nn.Linear(2048, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(self.body(x), 8)
        return self.head(torch.relu(self.wide(pooled.flatten(1))))


def test_a_wide_layer_s_gradient_is_made_behind_the_highest_moment() -> None:
    torch.manual_seed(0)
    model, x, y = WideHead(), torch.randn(4, 3, 64, 64), torch.randint(5, (4,))
    loss = nn.functional.cross_entropy
    planned = graphplan.optimize(model, "100%", (x,), loss_fn=loss, example_targets=y)
    graph = planned.entry().prepared.graph
    weight = next(g for p, g in zip(graph.primals, graph.gradients, strict=True) if p.path == "wide.weight")
    assert weight is not None
    assert graph.ops[-1].writes == graph.storages_of[weight]
    found = graphplan.measure(planned, (x,), loss, example_targets=y).peak_bytes
    assert found <= planned.plan.peak_bytes
    images = 4 * 16 * 64 * 64 * 4  # bytes of one of them; the second convolution's backward has three at once
    assert found <= graphplan.measure(model, (x,), loss, example_targets=y).peak_bytes - 2 * images
    loss(planned(x), y).backward()
    mine = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss(model(x), y).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(mine, model.parameters(), strict=True))


LAYERS = st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 5))


@settings(max_examples=12, deadline=None)
@given(st.lists(LAYERS, min_size=2, max_size=9), st.integers(0, 99))
def test_far_moves_keep_every_bit_and_never_raise_the_working_set(layers: list[Any], seed: int) -> None:
    torch.manual_seed(seed)
    model = Branches([s for s, _ in layers], [k for _, k in layers])
    if not any(k in (0, 2, 5) for _, k in layers):
        model.kinds[0] = 5
    x, y = torch.randn(16, 8), torch.randn(16, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order._Half, "_postponed", lambda self, ops: None)
        before = graphplan.optimize(model, "100%", (x,), time_limit=1)
    planned = graphplan.optimize(model, "100%", (x,), time_limit=1)
    working_sets = [working_set(p.entry().prepared.problem).peak_bytes for p in (before, planned)]
    assert working_sets[1] <= working_sets[0]
    found = []
    for module in (model, planned.at_budget(planned.plan.minimum_peak_bytes)):
        torch.manual_seed(seed)
        nn.functional.mse_loss(module(x), y).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
    for name, gradient in found[0].items():
        assert (gradient is None) is (found[1][name] is None)
        assert gradient is None or torch.equal(gradient, found[1][name])


@settings(max_examples=12, deadline=None)
@given(st.lists(LAYERS, min_size=2, max_size=9), st.integers(0, 99))
def test_branches_train_to_the_same_bits(layers: list[tuple[list[int], int]], seed: int) -> None:
    torch.manual_seed(seed)
    model = Branches([s for s, _ in layers], [k for _, k in layers])
    if not any(k in (0, 2, 5) for _, k in layers):
        model.kinds[0] = 0
    plain = copy.deepcopy(model)
    x, y = torch.randn(16, 8), torch.randn(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = graphplan.train_step(model, nn.functional.mse_loss, optimizer, "100%", x, y, time_limit=1)
    prepared = step.entry().prepared
    prepared.graph.verify()
    assert step.plan.minimum_peak_bytes >= working_set(prepared.problem).peak_bytes
    assert simulate(prepared.problem, prepared.problem.program).peak_bytes <= prepared.baseline_peak_bytes
    least = step.at_budget(step.plan.minimum_peak_bytes)
    other = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        state = torch.get_rng_state()
        loss = least(x, y)
        torch.set_rng_state(state)
        other.zero_grad()
        expected = nn.functional.mse_loss(plain(x), y)
        expected.backward()  # type: ignore[no-untyped-call]
        other.step()
        assert torch.equal(loss, expected)
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_copies_that_say_nothing_new_are_gone() -> None:
    x = torch.randn(64, 32)
    targets = [op.target for op in capture(nn.Sequential(Wide(), Wide()), (x,)).graph.ops]
    assert "aten.clone.default" not in targets

    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x).tanh()
            return y.clone(), y.sin()

    model = Returned()
    planned = graphplan.optimize(model, "100%", (x,))
    out, sines = planned(x)
    out.data.zero_()  # the caller's own copy: sin's backward must not see it
    sines.sum().backward()
    mine = model.layer.weight.grad
    model.layer.weight.grad = None
    model(x)[1].sum().backward()
    assert mine is not None
    assert torch.equal(mine, model.layer.weight.grad)
