"""What train_step refuses, in words that help; and what a step that breaks off leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_semantics import Net
from test_step import X, Y
from torch import nn
from torch.optim import SGD, Adam

import graphplan
from graphplan.instructions import instructions_of
from graphplan.rewrite import rewrite_whole


def step_of(
    model: nn.Module, optimizer: Any, loss_fn: Any = F.cross_entropy, x: Any = X, y: Any = Y, **more: Any
) -> Any:
    return graphplan.train_step(model, loss_fn, optimizer, "100%", x, y, **more)


def test_foreign_parameters() -> None:
    with pytest.raises(graphplan.UnsupportedOptimizer, match=r"group 0 .* \(3, 5\) that the model does not have"):
        step_of(Net(), SGD([torch.zeros(3, 5, requires_grad=True)], lr=0.1))


def test_closures_and_other_optimizers() -> None:
    model = Net()
    with pytest.raises(graphplan.UnsupportedOptimizer, match="LBFGS evaluates the loss several times"):
        step_of(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(graphplan.UnsupportedOptimizer, match="RMSprop cannot be planned; SGD, Adam, AdamW can"):
        step_of(model, torch.optim.RMSprop(model.parameters()))
    with pytest.raises(graphplan.UnsupportedOptimizer, match=r"expected a torch\.optim optimizer, got float"):
        step_of(model, 0.1)
    with pytest.raises(graphplan.UnsupportedOptimizer, match="differentiable"):
        step_of(model, SGD(model.parameters(), lr=0.1, differentiable=True))
    hooked = SGD(model.parameters(), lr=0.1)
    hooked.register_step_post_hook(lambda *_: None)
    with pytest.raises(graphplan.UnsupportedOptimizer, match="step hooks"):
        step_of(model, hooked)


def test_sparse_gradients_and_hooks() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))
    with pytest.raises(graphplan.UnsupportedOptimizer, match="'0' gives sparse gradients"):
        step_of(model, SGD(model.parameters(), lr=0.1), x=torch.arange(5), y=torch.zeros(5, dtype=torch.long))
    model = Net()
    model.head.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(graphplan.UnsupportedOptimizer, match=r"'head.weight' has a gradient hook.*keep_grads"):
        step_of(model, SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda out, y: out, r"float32\(8, 3\); a step needs one scalar"),
        (lambda out, y: (out.sum(), y), "returned tuple"),
        (lambda out, y: out.argmax(), "int64"),
        (lambda out, y: out.detach().sum(), "does not depend on any parameter|require"),
    ],
)
def test_losses_that_are_none(loss_fn: Any, message: str) -> None:
    model = Net()
    with pytest.raises(graphplan.CaptureError, match=message):
        step_of(model, SGD(model.parameters(), lr=0.1), loss_fn)


def test_targets_of_another_shape_change_nothing() -> None:
    model = Net()
    step = step_of(model, SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(graphplan.CaptureError, match="batch_size"):
        step(X, Y[:5])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_state_of_another_dtype() -> None:
    model = Net()
    optimizer = Adam(model.parameters())
    step = step_of(model, optimizer)
    step(X, Y)
    optimizer.state[model.head.weight]["exp_avg"] = torch.zeros(3, 16, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(graphplan.UnsupportedOptimizer, match=r"'exp_avg' of parameter 'head.weight' is torch.float64"):
        step(X, Y)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_options_that_make_no_sense() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(graphplan.GraphplanError, match="not both"):
        step_of(model, optimizer, clip_norm=1.0, clip_value=1.0)
    with pytest.raises(graphplan.GraphplanError, match="clip_norm -1 must be positive"):
        step_of(model, optimizer, clip_norm=-1)
    with pytest.raises(graphplan.UnsupportedOptimizer, match="keep_grads names 'nobody'"):
        step_of(model, optimizer, keep_grads=["nobody"])
    with pytest.raises(graphplan.UnsupportedModel, match="loss_fn has parameters"):
        step_of(model, optimizer, nn.Linear(3, 1))
    with pytest.raises(graphplan.UnsupportedOptimizer, match="nothing to update"):
        step_of(model, SGD([p.requires_grad_(False) for p in model.head.parameters()], lr=0.1))


def test_an_error_in_the_forward_leaves_everything() -> None:
    """A class out of range is found in the loss, after the forward: nothing has been written by then."""
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = step_of(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(IndexError, match="out of bounds"):
        step(X, Y + 7)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not optimizer.state


def test_an_error_after_the_first_update_says_so() -> None:
    model = Net()
    step = step_of(model, SGD(model.parameters(), lr=0.1))
    optimizer = step.optimizer
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    optimizer.param_groups.pop()
    late = [s for s in step.plan.steps if s.startswith("update_")][-1]
    node = next(n for n in step.graph_module.graph.nodes if n.name == late)

    def fail(*_: Any) -> None:
        raise MemoryError("no more")

    node.target = fail
    step.graph_module.recompile()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(graphplan.StepFailed, match=r"MemoryError: no more\) after it had written \d+ of \d+"):
        step(X, Y)
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_a_parameter_is_never_read_after_its_update() -> None:
    """The rewrite refuses a schedule that recomputes a forward op behind the update of a parameter that it reads."""
    model = Net()
    step = step_of(model, SGD(model.parameters(), lr=0.1))
    graph = step.entry().step.capture.graph
    steps = list(step.plan.steps)
    reader = next(op.name for op in graph.ops if "addmm" in op.target and op.name in steps)
    weight = next(op for op in graph.ops if op.name == reader).node.all_input_nodes
    assert weight
    end = steps.index("end")
    with pytest.raises(graphplan.PlanMismatch, match="after its update"):
        rewrite_whole(graph, instructions_of(graph, ()), [*steps[:end], reader, *steps[end:]])
