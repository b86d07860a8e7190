"""Results whose strides torch's fake kernels get wrong are brought into those that the trace went on with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphplan
from graphplan.passes import joint


class Tokens(nn.Module):
    """A normalisation over channels that stand last, as in encoders of time series, and what follows it."""

    def __init__(self, after: str) -> None:
        super().__init__()
        self.after = AFTER[after]
        self.lin, self.norm, self.image, self.head = (
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.BatchNorm2d(5), nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self, self.lin(x))


AFTER: dict[str, Callable[[Tokens, Tensor], Tensor]] = {
    "a view": lambda m, y: m.head(m.norm(y.transpose(1, 2)).transpose(1, 2)).relu(),
    "the result": lambda m, y: m.norm(y.transpose(1, 2)),
    "its transpose": lambda m, y: m.norm(y.transpose(1, 2)).transpose(1, 2),
    "flat": lambda m, y: m.norm(y.transpose(1, 2)).flatten(1).sin(),
    "images": lambda m, y: m.image(y.view(3, 2, 5, 4).transpose(1, 2).transpose(2, 3)).transpose(1, 2).reshape(3, -1),
    "no statistics": lambda m, y: F.batch_norm(y[:, 0].t(), None, None, training=True).t().reshape(-1),
    "its loss": lambda m, y: F.mse_loss(
        m.head(y).transpose(1, 2), torch.ones(3, 5, 3).transpose(1, 2).contiguous(), reduction="none"
    ),
}


@pytest.mark.parametrize("after", AFTER)
def test_same_values_whatever_order_kernels_write_in(after: str) -> None:
    torch.manual_seed(0)
    model, x = Tokens(after), torch.randn(3, 5, 8)
    planned = graphplan.optimize(model, "100%", (x,))
    found = []
    for net in (model, planned):
        model.zero_grad()
        out = net(x)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    graphplan.verify(planned, model, (x,))


class Compared(fx.Interpreter):
    """Runs a program and holds every result's strides against the traced ones."""

    def run_node(self, n: fx.Node) -> Any:
        result, traced = super().run_node(n), n.meta.get("val")
        if n.op == "call_function" and isinstance(result, Tensor) and isinstance(traced, Tensor):
            sides = zip(result.stride(), traced.stride(), result.shape, strict=True)
            assert all(a == b for a, b, size in sides if size > 1), n.name
        return result


def test_traced_strides_are_real_where_operands_have_two_orders() -> None:
    """SqueezeBERT's dropout has a mask in one order and a gradient in another."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SqueezeBertConfig(
        vocab_size=100, hidden_size=64, embedding_size=64, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=128,
    )  # fmt: skip
    model, ids = transformers.SqueezeBertForMaskedLM(config).train(), torch.randint(0, 100, (4, 32))
    batch, optimizer = {"input_ids": ids, "labels": ids}, torch.optim.SGD(model.parameters(), lr=0.01)
    step = graphplan.train_step(model, lambda outputs: outputs.loss, optimizer, "100%", batch, time_limit=4)
    for budget in (step.plan.budget_bytes, step.plan.minimum_peak_bytes):
        tight = step.at_budget(budget)
        tight.prepare(batch)
        assert graphplan.measure(tight, batch, runs=1).peak_bytes <= budget
        program = tight.graph_module
        program.forward = lambda given, program=program: Compared(program).run(*given)  # type: ignore[method-assign, misc]
        tight(batch)


def test_without_it_the_program_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """When this passes no longer, torch's fake kernels have been mended, and graphplan/strides.py can go."""
    monkeypatch.setattr(joint, "mend_strides", lambda graph: None)
    planned = graphplan.optimize(Tokens("a view"), "100%", (torch.randn(3, 5, 8),))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        planned(torch.randn(3, 5, 8))


class Asserting(nn.Module):
    """Has a check in its graph, an op without a result, of a tensor that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        turned = self.inner(x).t()
        torch.ops.aten._assert_tensor_metadata.default(turned, None, None, torch.float32)
        return turned.sin()


def test_an_op_without_a_result_is_passed_over() -> None:
    model, x = Asserting(), torch.randn(5, 6)
    planned = graphplan.optimize(model, "100%", x)
    assert torch.equal(planned(x), model(x))
