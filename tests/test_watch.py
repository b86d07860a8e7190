"""What a forward does to its model beside computing outputs happens in a planned step, too, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphplan


class Rebinding(nn.Module):
    """Gives its buffers other tensors, reads the old ones in its loss, and one of them becomes the other."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.plain = torch.ones(8) if plain else None  # a plain tensor attribute needs torch.export in front
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("before", torch.zeros(8))
        self.register_buffer("n", torch.tensor(0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x) if self.plain is None else self.a(x) * self.plain
        old = h * self.mean
        self.n = self.n + 1
        self.before = self.mean
        self.mean = self.mean * 0.9 + 0.1 * h.detach().mean(0)
        return old - self.mean * h, self.before


def same_buffers(model: nn.Module, plain: nn.Module) -> None:
    for (name, b), (_, c) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(b, c), name


@pytest.mark.parametrize("plain", [False, True])
def test_buffers_that_are_given_other_tensors(plain: bool) -> None:
    model = Rebinding(plain)
    other = copy.deepcopy(model)
    planned = graphplan.optimize(model, "100%", torch.randn(16, 8), time_limit=2)
    same_buffers(model, other)
    for i in range(3):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(i))
        outputs, expected = planned(x), other(x)
        for out, want in zip(outputs, expected, strict=True):
            assert torch.equal(out, want)
        outputs[0].square().sum().backward()
        expected[0].square().sum().backward()
        same_buffers(model, other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    planned.eval()(x)
    other.eval()(x)
    same_buffers(model, other)


@pytest.mark.parametrize("plain", [False, True])
def test_buffers_that_are_given_other_tensors_in_a_step(plain: bool) -> None:
    model, x = Rebinding(plain), torch.randn(16, 8)
    other = copy.deepcopy(model)
    sgd = torch.optim.SGD(other.parameters(), 0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = graphplan.train_step(model, lambda o: o[0].square().mean(), optimizer, "100%", x, time_limit=2)
    for _ in range(3):
        sgd.zero_grad()
        loss = other(x)[0].square().mean()
        loss.backward()
        sgd.step()
        torch.testing.assert_close(step(x), loss.detach())
        for (name, b), (_, c) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
            torch.testing.assert_close(b, c, msg=name)


class Doing(nn.Module):
    def __init__(self, does: Callable[[Doing, Tensor], object]) -> None:
        super().__init__()
        self.a, self.does = nn.Linear(8, 8), does
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("empty", None)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.a(x)
        self.does(self, h)
        return h.square()


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (lambda m, h: setattr(m, "mean", h.detach()[0, :4]), r"'mean' \(float32\[8\].*float32\[4\]"),
        (lambda m, h: setattr(m, "mean", m.mean.double()), "'mean'.*float64"),
        (lambda m, h: setattr(m, "mean", h.mean(0)), r"'mean'.*requires grad.*detach\(\)"),
        (lambda m, h: setattr(m, "mean", None), "takes away buffer 'mean'"),
        (lambda m, h: setattr(m, "empty", h.detach()), "fills buffer 'empty'.*call the model once"),
        (lambda m, h: m.register_buffer("new", h.detach()), "registers buffer 'new'.*call the model once"),
        (lambda m, h: setattr(m.a, "bias", nn.Parameter(torch.zeros(8))), "assigns parameter 'a.bias'"),
    ],
)
def test_other_assignments_are_refused(does: Callable[[Doing, Tensor], object], says: str) -> None:
    model, x = Doing(does), torch.randn(4, 8)
    with pytest.raises(graphplan.CaptureError, match=says):
        graphplan.optimize(model, "100%", x, time_limit=2)
    with pytest.raises(graphplan.CaptureError, match=says):
        graphplan.train_step(
            model, lambda o: o.mean(), torch.optim.SGD(model.parameters(), 0.1), "100%", x, time_limit=2
        )
    assert torch.equal(model.mean, torch.ones(8))


class Rotary(nn.Module):
    """Keeps a table that it makes at its first call: of its positions, and of a buffer."""

    def __init__(self, lazily: bool) -> None:
        super().__init__()
        self.a, self.lazily = nn.Linear(8, 8), lazily
        self.register_buffer("frequencies", torch.rand(8))
        if not lazily:
            self.register_buffer("table", None)

    def forward(self, x: Tensor) -> Tensor:
        if getattr(self, "table", None) is None:
            places = torch.arange(x.shape[0], device=x.device).type_as(x)
            table = (places[:, None] * self.frequencies + torch.zeros_like(x)).cos()
            self.register_buffer("table", table, persistent=False)
        return self.a(x) * self.table


@pytest.mark.parametrize("lazily", [False, True])
def test_a_table_that_is_made_at_the_first_call(lazily: bool) -> None:
    model, x = Rotary(lazily), torch.randn(16, 8)
    planned = graphplan.optimize(model, "100%", x, time_limit=2)
    assert getattr(model, "table", None) is None
    assert torch.equal(planned(x), copy.deepcopy(model)(x))


def test_an_argument_may_have_any_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, inputs: Tensor, args: Tensor) -> Tensor:
            return self.a(inputs) * args

    x = torch.randn(4, 8)
    planned = graphplan.optimize(Net(), "100%", {"inputs": x, "args": x}, time_limit=2)
    assert planned(inputs=x, args=x).shape == x.shape


class Averaging(nn.Module):
    """A key encoder that follows the query encoder by `.data = ...`, as MoCo's."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)
        self.plain = torch.ones(8) if plain else None
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        for q, k in zip(self.q.parameters(), self.k.parameters(), strict=True):
            k.data = k.data * 0.5 + q.data * 0.5
        self.n.data = (self.n + 1).detach()
        y: Tensor = self.q(x) * self.k(x)
        return y if self.plain is None else y * self.plain


@pytest.mark.parametrize("plain", [False, True])
def test_contents_given_to_what_is_not_trained(plain: bool) -> None:
    model, x = Averaging(plain), torch.randn(16, 8)
    other = copy.deepcopy(model)
    planned = graphplan.optimize(model, "100%", x, time_limit=2)
    same_buffers(model, other)
    for _ in range(2):
        planned(x).sum().backward()
        other(x).sum().backward()
        for (name, b), (_, c) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(b, c), name
    for p, q in zip(model.q.parameters(), other.q.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (lambda m, h: setattr(h, "data", h.data * 2), r"\.data of a tensor: .*x\.data\.copy_.*\n  at .*in <lambda>"),
        (lambda m, h: setattr(m.a.weight, "data", m.a.weight * 2), r"'a\.weight', which is trained.*optimizer\.step"),
        (lambda m, h: setattr(m.mean, "data", h.data), "'mean'.*keep its shape"),
        (lambda m, h: setattr(m.mean, "data", m.a.bias.data), r"'mean'.*share memory.*copy_"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_other_contents_are_refused(does: Callable[[Doing, Tensor], object], says: str, plain: bool) -> None:
    model = Doing(does if not plain else lambda m, h: does(m, h * m.ones))
    model.ones = torch.ones(8)
    with pytest.raises(graphplan.CaptureError, match=says):
        graphplan.optimize(model, "100%", torch.randn(4, 8), time_limit=2)
