"""A planned module behaves as the plain one: structures, modes, gradients of everything that has one."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphplan


class Block(nn.Module):
    """Linear, BatchNorm, ReLU, dropout: a bit of everything that planning must get right."""

    def __init__(self, width: int = 16, p: float = 0.2) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.relu(self.norm(self.lin(x)), inplace=True))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, scale: float = 1.0, *, flip: bool = False) -> Tensor:
        y = self.head(self.blocks(x)) * scale
        return -y if flip else y


@dataclass
class Answer:
    loss: Tensor
    extra: dict[str, Any]


class Odd(nn.Module):
    """Outputs of every kind: a dataclass with views, an input, a constant, a detached tensor, one tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.table = torch.arange(3.0)

    def forward(self, batch: dict[str, Tensor], names: list[str] | None = None) -> Answer:
        self.steps += 1
        y = self.net(batch["x"])
        hidden = torch.tanh(y * self.table)
        extra = {
            "hidden": hidden, "flat": hidden.view(-1), "transposed": hidden.t(), "input": batch["x"],
            "half": batch["x"][:, ::2], "detached": y.detach(), "again": y, "n": 3, "names": names, "none": None,
        }  # fmt: skip
        return Answer(loss=y.pow(2).mean() + hidden.sum(), extra=extra)


def both(model: nn.Module, budget: str, call: Callable[[nn.Module], Tensor], **kwargs: Any) -> tuple[Any, Any]:
    """Run `call` (returns a loss) on the model and on its planned twin; return both with gradients set."""
    twin = copy.deepcopy(model)
    planned = graphplan.optimize(twin, budget, time_limit=2, **kwargs)
    for net in (model, planned):
        torch.manual_seed(7)
        call(net).backward()
    return model, planned


def assert_same(model: nn.Module, planned: nn.Module) -> None:
    for (name, a), b in zip(model.named_parameters(), planned.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    for (name, a), b in zip(model.named_buffers(), planned.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


BUDGETS = ["100%", "90%"]


@pytest.mark.parametrize("budget", BUDGETS)
def test_kwargs_and_plain_values(budget: str) -> None:
    x = torch.randn(512, 16)
    assert_same(*both(Net(), budget, lambda m: m(x, 2.0, flip=True).pow(2).sum()))


@pytest.mark.parametrize("budget", BUDGETS)
def test_keyword_order_and_position_do_not_matter(budget: str) -> None:
    planned = graphplan.optimize(Net(), budget, time_limit=2)
    x = torch.randn(256, 16)
    planned(x=x, scale=2.0, flip=False)
    planned(flip=False, x=x, scale=2.0)
    assert len(planned._entries) == 1
    planned(x, 3.0)
    assert len(planned._entries) == 2


@pytest.mark.parametrize("budget", BUDGETS)
def test_odd_outputs(budget: str) -> None:
    x = torch.randn(256, 16)
    model, planned = both(Odd(), budget, lambda m: m({"x": x}).loss)
    assert_same(model, planned)
    torch.manual_seed(3)
    a = model({"x": x}, ["p"])
    torch.manual_seed(3)
    b = planned({"x": x}, ["p"])
    assert type(b) is Answer
    assert b.extra["n"] == 3
    assert b.extra["names"] == ["p"]
    assert b.extra["none"] is None
    assert b.extra["input"] is x
    for key in ("hidden", "flat", "transposed", "half", "detached", "again"):
        torch.testing.assert_close(a.extra[key], b.extra[key], msg=key)
        assert a.extra[key].requires_grad == b.extra[key].requires_grad, key
        assert a.extra[key].stride() == b.extra[key].stride(), key
    assert int(planned.steps) == 2


@pytest.mark.parametrize("budget", BUDGETS)
def test_gradients_through_views_of_outputs(budget: str) -> None:
    x = torch.randn(128, 16)

    def loss(m: nn.Module) -> Tensor:
        out = m({"x": x}).extra
        return out["flat"].pow(2).sum() + out["transposed"][0].sum() + out["again"].sum()

    assert_same(*both(Odd(), budget, loss))


def test_inputs_that_require_grad_and_frozen_parameters() -> None:
    model = Net()
    model.blocks[1].requires_grad_(False)
    twin = copy.deepcopy(model)
    planned = graphplan.optimize(twin, "90%", time_limit=2)
    grads = []
    for net in (model, planned):
        x = torch.randn(256, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(7)
        net(x).pow(2).sum().backward()
        grads.append(x.grad)
    assert_same(model, planned)
    torch.testing.assert_close(grads[0], grads[1])


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.body = Net().blocks
            self.out = nn.Linear(16, 50, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.body(self.embed(ids)))

    ids = torch.randint(0, 50, (128,))
    model, planned = both(Tied(), "90%", lambda m: F.cross_entropy(m(ids), ids))
    assert_same(model, planned)
    assert planned.out.weight is planned.embed.weight
    assert list(planned.state_dict()) == list(model.state_dict())


def test_several_losses_with_retained_graph() -> None:
    x = torch.randn(128, 16)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.net(x)
            return y.pow(2).sum(), y.abs().sum()

    model = Two()
    planned = graphplan.optimize(copy.deepcopy(model), "100%", time_limit=2)
    for net in (model, planned):
        torch.manual_seed(7)
        a, b = net(x)
        a.backward(retain_graph=True)
        b.backward()
    assert_same(model, planned)


def test_an_output_that_no_loss_uses() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    x = torch.randn(16, 8)
    _, planned = both(Two(), "100%", lambda m: m(x)[0].sum())
    assert planned.a.weight.grad is not None


def test_evaluation_and_no_grad_run_unplanned() -> None:
    planned = graphplan.optimize(Net(), "90%", time_limit=2)
    x = torch.randn(8, 16)
    with torch.no_grad():
        assert not planned(x).requires_grad
    planned.eval()
    assert not planned.blocks[0].training
    planned(x)
    assert planned._entries == {}
    planned.train()
    planned(x)
    assert len(planned._entries) == 1


def test_deepcopy_and_state_dict() -> None:
    x = torch.randn(64, 16)
    planned = graphplan.optimize(Net(), "90%", (x,), time_limit=2)
    twin = copy.deepcopy(planned)
    with torch.no_grad():
        twin.head.weight.zero_()
    assert planned.head.weight.abs().sum() > 0
    assert twin(x).abs().max() == twin.head.bias.abs().max()
    planned.load_state_dict(twin.state_dict())
    torch.testing.assert_close(planned.head.weight, twin.head.weight)


def test_a_saved_module_plans_anew_where_it_is_loaded() -> None:
    x, file = torch.randn(64, 16), io.BytesIO()
    planned = graphplan.optimize(Net(), "90%", (x,), codecs=("bitmask",), time_limit=2)
    torch.save(planned, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert again._entries == {}
    for module in (planned, again):
        torch.manual_seed(1)
        module(x).sum().backward()
    for (name, p), q in zip(planned.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=0, msg=name)
    assert again.plan.codecs == planned.plan.codecs


def test_forward_has_the_models_signature() -> None:
    model = Net()
    planned = graphplan.optimize(model, "90%")
    assert inspect.signature(planned.forward) == inspect.signature(model.forward)
    assert "kwargs" in inspect.signature(type(planned).forward).parameters


def test_to_dtype_before_planning() -> None:
    x = torch.randn(64, 16, dtype=torch.float64)
    model, planned = both(Net().to(torch.float64), "100%", lambda m: m(x).sum())
    assert_same(model, planned)


def test_autocast_is_captured_with_the_graph() -> None:
    x = torch.randn(64, 16)

    def loss(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        assert y.dtype is torch.bfloat16
        return y.float().pow(2).sum()

    model, planned = both(Net(), "100%", loss)
    for a, b in zip(model.parameters(), planned.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0.1, atol=0.1)


def test_training_for_real() -> None:
    """Thirty steps of SGD end in the same parameters as plain PyTorch's, within rounding."""
    x, t = torch.randn(128, 16), torch.randint(0, 3, (128,))
    model = Net()
    planned = graphplan.optimize(copy.deepcopy(model), "85%", time_limit=2)
    for net in (model, planned):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for _ in range(30):
            optimizer.zero_grad()
            F.cross_entropy(net(x), t).backward()
            optimizer.step()
    for a, b in zip(model.state_dict().values(), planned.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_in_place_change_between_forward_and_backward_is_refused() -> None:
    planned = graphplan.optimize(Net(), "100%", time_limit=2)
    y = planned(torch.randn(32, 16))
    with torch.no_grad():
        planned.head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_recurrent_buffers_read_and_written() -> None:
    """A buffer that the forward reads, changes, and whose old value the backward needs."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)
            self.register_buffer("u", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.lin(x) * self.u.clone()
            self.u.mul_(0.5)
            return y.tanh()

    x = torch.randn(32, 8)
    model, planned = both(Spectral(), "100%", lambda m: m(x).sum() + m(x).pow(2).sum())
    assert_same(model, planned)


def test_spectral_norm_and_checkpoint_and_embedding_bag() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(20, 16, mode="sum")
            self.lin = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
            self.spec = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))

        def forward(self, ids: Tensor) -> Tensor:
            return self.spec(self.lin(self.bag(ids)).relu()).relu()

    ids = torch.randint(0, 20, (32, 5))
    assert_same(*both(Mixed(), "100%", lambda m: m(ids).pow(2).sum()))


def test_recurrent_and_norm_layers() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 8, 3, padding=1)
            self.group = nn.GroupNorm(2, 8)
            self.inst = nn.InstanceNorm1d(8, affine=True, track_running_stats=True)
            self.gru = nn.GRU(8, 8, batch_first=True, bidirectional=True)
            self.attn = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
            self.ln = nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inst(self.group(self.conv(x)).relu()).transpose(1, 2)
            y, _ = self.gru(y)
            z, _ = self.attn(y, y, y, need_weights=False)
            return self.ln(y + z).mean()

    x = torch.randn(4, 4, 10)
    assert_same(*both(Many(), "90%", lambda m: m(x)))


def test_torch_compile_backend() -> None:
    model = Net()
    twin = copy.deepcopy(model)
    x = torch.randn(64, 16)
    compiled = torch.compile(twin, backend="graphplan", options={"budget": "90%", "time_limit": 5.0}, fullgraph=True)
    for net in (model, compiled):
        torch.manual_seed(7)
        net(x, 2.0).pow(2).sum().backward()
    assert_same(model, twin)
    with torch.no_grad():
        compiled(x)
    with pytest.raises(Exception, match="needs options"):
        torch.compile(Net(), backend="graphplan")(x)


def test_pareto_trades_memory_for_time() -> None:
    model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 1))
    plans = graphplan.pareto(model, (torch.randn(256, 8),), points=5, time_limit=20)
    assert len(plans) >= 2
    assert [p.peak_bytes for p in plans] == sorted(p.peak_bytes for p in plans)
    assert [p.cost_ns for p in plans] == sorted((p.cost_ns for p in plans), reverse=True)
    assert plans[0].peak_bytes == plans[0].minimum_peak_bytes


def test_one_tensor_is_one_argument() -> None:
    x = torch.randn(32, 16)
    model = Net()
    planned = graphplan.optimize(model, "100%", x, time_limit=2)
    graphplan.verify(planned, model, x)
    assert graphplan.measure(model, x, runs=1).peak_bytes > 0
    assert graphplan.pareto(model, x, points=1, time_limit=2)


def test_a_module_under_two_names() -> None:
    """Its buffers change twice a step, and stay the model's own tensors."""
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Tanh(), nn.Linear(4, 4), norm)
    x = torch.randn(8, 4)
    plain, planned = both(model, "100%", lambda net: net(x).pow(3).sum())
    assert all(type(b) is Tensor for b in planned._model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), planned._model.buffers(), strict=True))
    assert all(torch.allclose(a.grad, b.grad) for a, b in zip(plain.parameters(), planned.parameters(), strict=True))
