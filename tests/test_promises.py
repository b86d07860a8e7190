"""The promises, on every zoo model at several budgets between the least feasible and the unplanned peak."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphplan
import solvers
from models_zoo import MODELS, Entry

FRACTIONS = (0.0, 0.1, 0.5, 0.9, 1.0)
SECONDS = 2.0


def loss_of(entry: Entry, targets: object) -> object:
    """Return the zoo's loss in the form that `optimize` takes."""
    return entry.loss if targets is not None else (lambda outputs: entry.loss(outputs, None))


@pytest.mark.parametrize("name", MODELS)
def test_every_promise(name: str) -> None:
    entry = MODELS[name]
    model, example = entry.build_small(), entry.example_small()
    loss = {"loss_fn": loss_of(entry, example.targets), "example_targets": example.targets}

    first = graphplan.optimize(model, "100%", example.inputs, time_limit=SECONDS, **loss)
    least, top = first.plan.minimum_peak_bytes, first.plan.baseline_peak_bytes
    assert least < top
    plans = []
    for f in FRACTIONS:
        budget = least + int(f * (top - least))
        planned = first.at_budget(budget)
        # 1 and 2: the measured peak, gradients, outputs, buffers and the RNG stream; raises on a breach.
        report = graphplan.verify(planned, model, example.inputs, **loss)
        assert report.peak_bytes <= budget
        assert 0.99 <= report.peak_bytes / planned.plan.peak_bytes <= 1.01
        assert planned.plan.budget_bytes == budget
        plans.append(planned.plan)
    # 3: more budget never costs more predicted time, beyond what each search left unproven.
    for tight, roomy in pairwise(plans):
        slack = 1e-4 if roomy.status == "optimal" else roomy.gap + 1e-4
        assert roomy.cost_ns <= tight.cost_ns * (1 + slack)
    assert any(d.fate != "keep" for d in plans[0].decisions.values())
    # 4: below the least feasible peak the error says what would do.
    with pytest.raises(graphplan.InfeasibleBudget) as caught:
        first.at_budget(least // 2).prepare(*example.inputs)
    assert least // 2 < caught.value.minimum_bytes <= least
    assert caught.value.binding_op in str(caught.value)


@pytest.mark.parametrize("name", ["mlp", "resnet18", pytest.param("gpt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver", [s for s in solvers.SOLVERS if s != "oracle"])
def test_every_solver_keeps_the_promises(name: str, solver: str) -> None:
    entry = MODELS[name]
    model, example = entry.build_small(), entry.example_small()
    loss = {"loss_fn": loss_of(entry, example.targets), "example_targets": example.targets}
    try:
        planned = graphplan.optimize(model, "85%", example.inputs, solver=solver, time_limit=1.0, **loss)
    except graphplan.InfeasibleBudget:
        assert solver not in ("auto", "greedy", "ilp")  # the others cannot aim at every budget
        return
    graphplan.verify(planned, model, example.inputs, **loss)


@pytest.mark.parametrize("codecs", ["none", "exact", ("bitmask",), ("narrow", "stand_in")])
def test_every_choice_of_codecs_is_exact(codecs: str | tuple[str, ...]) -> None:
    entry = MODELS["vgg16_bn"]
    model, example = entry.build_small(), entry.example_small()
    loss = {"loss_fn": entry.loss, "example_targets": example.targets}
    free = graphplan.optimize(model, "100%", example.inputs, codecs=codecs, time_limit=SECONDS, **loss)
    planned = free.at_budget(free.plan.minimum_peak_bytes)
    graphplan.verify(planned, model, example.inputs, **loss)
    used = {d.codec for d in planned.plan.decisions.values() if d.codec}
    assert used <= set(planned.plan.codecs)  # that they are used is tested where nothing else would do


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropout_draws_what_the_plain_model_draws(p: float) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(p), nn.Linear(8, 2)), torch.randn(4, 8)
    planned, states = graphplan.optimize(model, "100%", (x,)), []
    for net in (model, planned):
        torch.manual_seed(3)
        states.append((net(x), torch.get_rng_state()))
    assert all(map(torch.equal, *states))


def test_an_output_is_not_made_again() -> None:
    """The caller holds it to the end: a second one beside it, or the first one forgotten, would break the bytes."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.BatchNorm1d(64)), torch.randn(256, 64)
    for net in (model, model[:2]):
        planned = graphplan.optimize(net, "100%", (x,))
        problem = planned.entry().prepared.problem
        outputs = {v for v in problem.keep if any(v in problem.ops[o].writes for o in problem.program[: problem.turn])}
        assert outputs
        for op in problem.ops:
            assert not (op.repeatable and outputs.intersection(op.writes)), op.name


@pytest.mark.parametrize(
    "options", [{"mode": "sum", "padding_idx": 0}, {"mode": "mean"}, {"include_last_offset": True}]
)
def test_results_that_kernels_cut_count_whole(options: dict[str, Any]) -> None:
    """An embedding bag's kernel makes its indices one longer than it returns them."""

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.out = nn.EmbeddingBag(1000, 32, **options), nn.Linear(32, 4)

        def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
            return self.out(self.bag(ids, offsets))

    inputs = (torch.randint(1000, (100,)), torch.arange(0, 100, 10))
    loss_fn = lambda outputs: outputs.square().mean()  # noqa: E731
    planned = graphplan.optimize(Bag(), "100%", inputs, loss_fn=loss_fn)
    assert graphplan.measure(planned, inputs, loss_fn, runs=1).peak_bytes <= planned.plan.peak_bytes
