"""Sabotage: `verify` must catch a planned step that is wrong, and name what differs first."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphplan

ROOT = Path(__file__).parent.parent
X = torch.randn(64, 8)


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1))]
    return nn.Sequential(*layers, nn.Linear(8, 1))


@pytest.fixture
def planned() -> graphplan.PlannedModule:
    return graphplan.optimize(build(), "85%", (X,), loss_fn=lambda y: y.pow(2).mean())


def sabotage(planned: graphplan.PlannedModule, half: str, change: Callable[[Any, list[Any]], Any]) -> None:
    """Replace one half of the program by one that calls `change(original, arguments)`."""
    key, entry = next(iter(planned._entries.items()))
    original = getattr(entry.step.rewritten, half)
    wrong = replace(entry.step.rewritten, **{half: lambda arguments: change(original, arguments)})
    planned._entries[key] = replace(entry, step=replace(entry.step, rewritten=wrong))


def check(planned: graphplan.PlannedModule) -> graphplan.Report:
    return graphplan.verify(planned, planned._model, (X,), loss_fn=lambda y: y.pow(2).mean())


def test_a_right_step_passes(planned: graphplan.PlannedModule) -> None:
    report = check(planned)
    assert report.ok
    assert len(report.checks) == 10
    assert "peak within the budget" in str(report)


def test_a_gradient_off_by_one_bit(planned: graphplan.PlannedModule) -> None:
    def nudge(original: Any, arguments: list[Any]) -> Any:
        grads = list(original(arguments))
        grads[2] = torch.nextafter(grads[2], torch.full_like(grads[2], torch.inf))
        return tuple(grads)

    sabotage(planned, "backward", nudge)
    with pytest.raises(graphplan.PromiseBroken, match=r"gradients against the unplanned graph.*'1.weight' differs"):
        check(planned)


def test_a_buffer_updated_twice(planned: graphplan.PlannedModule) -> None:
    def twice(original: Any, arguments: list[Any]) -> Any:
        original(list(arguments))
        return original(arguments)

    sabotage(planned, "forward", twice)
    with pytest.raises(graphplan.PromiseBroken) as caught:
        check(planned)
    assert "FAIL buffers against the unplanned graph: '1.running_mean' differs" in str(caught.value)
    assert "FAIL rng against the plain model" in str(caught.value)


def test_one_random_number_too_many(planned: graphplan.PlannedModule) -> None:
    def draw(original: Any, arguments: list[Any]) -> Any:
        torch.rand(1)
        return original(arguments)

    sabotage(planned, "backward", draw)
    with pytest.raises(graphplan.PromiseBroken, match="rng against the unplanned graph"):
        check(planned)


def test_memory_held_too_long(planned: graphplan.PlannedModule) -> None:
    def hold(original: Any, arguments: list[Any]) -> Any:
        extra = torch.empty(100_000)
        return original(arguments) if extra.numel() else None

    sabotage(planned, "backward", hold)
    with pytest.raises(graphplan.PromiseBroken, match="peak within the budget"):
        check(planned)


def test_a_dropout_drawn_again_is_caught() -> None:
    """The field's best known bug: recomputing dropout with fresh randomness."""
    planned = graphplan.optimize(build(), "85%", (X,), loss_fn=lambda y: y.pow(2).mean(), codecs="none")
    tight = planned.at_budget(planned.plan.minimum_peak_bytes)
    tight.prepare(X)
    assert any(s.endswith("__apply") for s in tight.plan.steps)
    _, entry = next(iter(tight._entries.items()))
    module = entry.step.rewritten.backward
    for node in list(module.graph.nodes):
        if "dropout_from_mask" in str(node.target):
            with module.graph.inserting_before(node):
                fresh = module.graph.call_function(torch.ops.aten.native_dropout.default, (node.args[0], 0.1, True))
                node.replace_all_uses_with(module.graph.call_function(operator.getitem, (fresh, 0)))
    module.recompile()
    with pytest.raises(graphplan.PromiseBroken, match="gradients against the unplanned graph"):
        check(tight)


def test_a_plan_gives_the_same_program_in_another_process(planned: graphplan.PlannedModule, tmp_path: Path) -> None:
    planned.plan.save(tmp_path / "plan.json")
    code = (
        "import sys, graphplan\n"
        "from test_verify import X, build\n"
        "plan = graphplan.Plan.load(sys.argv[1])\n"
        "planned = graphplan.apply(build(), plan, (X,))\n"
        "sys.stdout.write(planned.graph_module.code)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    command = [sys.executable, "-c", code, str(tmp_path / "plan.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == planned.graph_module.code
