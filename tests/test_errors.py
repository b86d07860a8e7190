"""Bad input gets a clear error: what was wrong, where, what would work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphplan
from graphplan import Plan


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


def deep() -> nn.Module:
    layers = [m for _ in range(6) for m in (nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1))]
    return nn.Sequential(*layers, nn.Linear(8, 1))


X = torch.randn(64, 8)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("0", "positive"), ("-5", "positive"), ("60", "no unit"), ("abc", "not a size"), ("140%", "more than"),
        (float("nan"), "whole number"), (float("inf"), "whole number"), (0, "positive"), (-1, "positive"),
        ("10 lightyears", "unknown unit"), (True, "bool"), (None, "NoneType"), ("", "not a size"), ("0%", "positive"),
        ("nan", "not a size"), ("1e400GB", "not a size"),
    ],
)  # fmt: skip
def test_budgets(budget: object, says: str) -> None:
    with pytest.raises(graphplan.BudgetError, match=says):
        graphplan.optimize(net(), budget)


@pytest.mark.parametrize("budget", ["512MiB", "1.5GB", "60%", "100 %", " 1e9 b ", 10**9])
def test_budgets_that_are_fine(budget: int | str) -> None:
    graphplan.optimize(net(), budget)


def test_the_least_budget_is_named_and_works() -> None:
    with pytest.raises(graphplan.InfeasibleBudget) as caught:
        graphplan.optimize(net(), 1000, (X,))
    assert "Raise the budget" in str(caught.value)
    planned = graphplan.optimize(net(), caught.value.minimum_bytes, (X,))
    assert planned.plan.peak_bytes <= caught.value.minimum_bytes
    assert graphplan.measure(planned, (X,), runs=1).peak_bytes <= caught.value.minimum_bytes


def test_inputs_that_the_model_does_not_take() -> None:
    with pytest.raises(graphplan.CaptureError, match="example_inputs must be what model"):
        graphplan.optimize(net(), "100%", (X, X))
    with pytest.raises(graphplan.CaptureError, match="same reduction dim"):
        graphplan.optimize(net(), "100%", (torch.randn(3, 5),))


def test_data_dependent_control_flow_names_the_line() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.lin(x)
            if y.sum() > 0:
                return y
            return -y

    with pytest.raises(graphplan.CaptureError, match=r"test_errors.py:\d+ in forward: if y.sum\(\) > 0:") as caught:
        graphplan.optimize(Branch(), "100%", (X,))
    assert "torch.where" in str(caught.value)


def test_a_shape_that_depends_on_a_plain_tensor_names_the_line() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.mask = nn.Linear(8, 8), torch.arange(8) > 2  # neither parameter nor buffer

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x)[:, self.mask]

    with pytest.raises(
        graphplan.CaptureError, match=r"DynamicOutputShape.*\n.*self.lin\(x\)\[:, self.mask\]"
    ) as caught:
        graphplan.optimize(Masked(), "100%", (X,))
    assert "boolean mask" in str(caught.value)


def test_nothing_to_train() -> None:
    with pytest.raises(graphplan.UnsupportedModel, match="no trainable parameter"):
        graphplan.optimize(net().requires_grad_(False), "100%", (X,))
    with pytest.raises(graphplan.UnsupportedModel, match=r"expected a torch.nn.Module"):
        graphplan.optimize(lambda x: x, "100%", (X,))


def test_parameters_that_cannot_be_planned() -> None:
    model = net()
    model.register_parameter("s", nn.Parameter(torch.eye(3).to_sparse()))
    with pytest.raises(graphplan.UnsupportedModel, match="'s' is sparse"):
        graphplan.optimize(model, "100%", (X,))
    with pytest.raises(graphplan.UnsupportedModel, match="not initialised"):
        graphplan.optimize(nn.LazyLinear(3), "100%", (X,))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"codecs": "zip"}, "no codec 'zip'"),
        ({"codecs": None}, "no codec None"),
        ({"codecs": ("bitmask", "zip")}, "no codec 'zip'"),
        ({"solver": "magic"}, "no solver 'magic'"),
        ({"time_limit": 0}, "time_limit"),
        ({"time_limit": float("nan")}, "time_limit"),
        ({"gradient_noise": 7}, "gradient_noise"),
        ({"device": "cuda"}, r"graphplan\.Device"),
    ],
)
def test_options(options: dict[str, object], says: str) -> None:
    with pytest.raises(graphplan.GraphplanError, match=says):
        graphplan.optimize(net(), "100%", **options)


def test_a_loss_that_fails() -> None:
    with pytest.raises(graphplan.GraphplanError, match=r"loss_fn fails on outputs .* IndexError|loss_fn fails"):
        graphplan.optimize(net(), "100%", (X,), loss_fn=lambda y: F.cross_entropy(y, torch.tensor([99] * 64)))


def test_double_backward_and_second_backward() -> None:
    planned = graphplan.optimize(net(), "100%", (X,))
    loss = planned(X).pow(2).sum()
    with pytest.raises(graphplan.BackwardError, match="second derivative"):
        torch.autograd.grad(loss, list(planned.parameters()), create_graph=True)
    loss = planned(X).pow(2).sum()
    y = planned(X)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    z = planned(X)
    z.sum().backward()
    with pytest.raises(graphplan.BackwardError, match="retain_graph=True"):
        z.sum().backward()


def test_no_plan_yet() -> None:
    planned = graphplan.optimize(net(), "100%")
    with pytest.raises(graphplan.GraphplanError, match="no plan yet"):
        _ = planned.plan
    with pytest.raises(graphplan.GraphplanError, match="evaluation mode"):
        planned.eval().prepare(X)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = planned.no_such_thing


class TestPlanFiles:
    @pytest.fixture(scope="class")
    def plan(self) -> Plan:
        return graphplan.optimize(deep(), "75%", (X,)).plan

    def test_round_trip(self, plan: Plan, tmp_path: Path) -> None:
        plan.save(tmp_path / "p.json")
        assert Plan.load(tmp_path / "p.json") == plan
        assert [p.name for p in tmp_path.iterdir()] == ["p.json"]

    def test_truncated_at_every_tenth(self, plan: Plan, tmp_path: Path) -> None:
        text = plan.to_json()
        for i in range(0, 10):
            (tmp_path / "t.json").write_text(text[: i * len(text) // 10])
            with pytest.raises(graphplan.PlanFormatError, match=r"t.json: not JSON \(truncated\?\)"):
                Plan.load(tmp_path / "t.json")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"version": 99}, "plan version 99"),
            ({"format": "other"}, "not a plan"),
            ({"steps": None}, "'steps' is not a list"),
            ({"steps": [1, 2]}, "'steps' is not a list"),
            ({"budget_bytes": "lots"}, "'budget_bytes' is 'lots'"),
            ({"budget_bytes": 1.5}, "'budget_bytes' is 1.5"),
            ({"decisions": {"relu": {"fate": "swap", "nbytes": 3}}}, "unknown fate"),
            ({"decisions": {"relu": 3}}, "malformed"),
            ({"surprise": 1}, "unknown fields"),
        ],
    )
    def test_malformed(self, plan: Plan, change: dict[str, object], says: str) -> None:
        with pytest.raises(graphplan.PlanFormatError, match=says):
            Plan.from_json(json.dumps({**json.loads(plan.to_json()), **change}))

    def test_missing_field(self, plan: Plan) -> None:
        data = json.loads(plan.to_json())
        del data["peak_bytes"]
        with pytest.raises(graphplan.PlanFormatError, match=r"missing fields.*peak_bytes"):
            Plan.from_json(json.dumps(data))

    def test_apply_elsewhere(self, plan: Plan) -> None:
        model = deep()
        planned = graphplan.apply(model, plan, (X,))
        assert planned.plan == plan
        assert planned.plan.steps == plan.steps
        graphplan.verify(planned, model, (X,))

    def test_a_plan_for_another_graph(self, plan: Plan) -> None:
        with pytest.raises(graphplan.PlanMismatch, match="the plan is for Sequential, graph"):
            graphplan.apply(nn.Sequential(nn.Linear(8, 4)), plan, (X,))
        with pytest.raises(graphplan.PlanMismatch, match="the same model code"):
            graphplan.apply(deep(), plan, (torch.randn(65, 8),))

    def edited(self, plan: Plan, steps: list[str]) -> Plan:
        return Plan.from_json(json.dumps({**json.loads(plan.to_json()), "steps": steps}))

    def test_unknown_missing_and_misplaced_ops(self, plan: Plan) -> None:
        steps = list(plan.steps)
        with pytest.raises(graphplan.PlanMismatch, match="names op 'warp_drive'"):
            graphplan.apply(deep(), self.edited(plan, [*steps[:3], "warp_drive", *steps[3:]]), (X,))
        with pytest.raises(graphplan.PlanMismatch, match="before it is written"):
            graphplan.apply(deep(), self.edited(plan, steps[1:]), (X,))
        with pytest.raises(graphplan.PlanMismatch, match="must run exactly once"):
            graphplan.apply(deep(), self.edited(plan, [s for s in steps if s != "turn"]), (X,))

    def test_a_plan_that_lies_about_its_peak(self, plan: Plan) -> None:
        data = {**json.loads(plan.to_json()), "budget_bytes": plan.fixed_bytes + 1}
        with pytest.raises(graphplan.PlanMismatch, match="its budget is"):
            graphplan.apply(deep(), Plan.from_json(json.dumps(data)), (X,))
