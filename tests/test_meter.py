"""The meter and the profile, against sizes that are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphplan
from graphplan.device import Device, DeviceFormatError
from graphplan.meter import Meter, peak_of

CPU = torch.device("cpu")


def test_known_sizes() -> None:
    def run() -> torch.Tensor:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        return b

    reading = peak_of(run, CPU)
    assert (reading.peak_bytes, reading.end_bytes) == (6000, 2000)


def test_frees_of_what_was_live_before_do_not_count() -> None:
    """The trap: a process that was profiled before reports frees of memory that this session never counted."""
    peak_of(lambda: torch.empty(1000), CPU)
    old = [torch.empty(100_000) for _ in range(5)]

    def run() -> torch.Tensor:
        a = torch.empty(1000)
        old.clear()
        return a

    assert peak_of(run, CPU).peak_bytes == 4000


def test_regions_do_not_mix() -> None:
    with Meter(CPU) as meter:
        for n in (10, 1000, 20):
            with meter.region():
                x = torch.empty(n)
            del x
    assert [r.peak_bytes for r in meter.readings] == [40, 4000, 80]


def test_measure_counts_everything_once() -> None:
    model = nn.Linear(100, 50, bias=False)
    x = torch.randn(10, 100)
    m = graphplan.measure(model, (x,), lambda y: y.sum(), runs=2)
    assert m.resident_bytes == 100 * 50 * 4 + 10 * 100 * 4
    # At the worst moment: output, loss, its gradient, weight gradient, contiguous copy of the output's gradient.
    assert m.peak_bytes == m.resident_bytes + 10 * 50 * 4 + 4 + 4 + 100 * 50 * 4 + 10 * 50 * 4
    assert model.weight.grad is None


def test_measure_puts_everything_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    x = torch.randn(8, 4)
    model(x).sum().backward()
    grad, mean, rng = model[0].weight.grad, model[1].running_mean.clone(), torch.get_rng_state()
    graphplan.measure(model, (x,), runs=1)
    assert model[0].weight.grad is grad
    assert torch.equal(model[1].running_mean, mean)
    assert int(model[1].num_batches_tracked) == 1
    assert torch.equal(torch.get_rng_state(), rng)


def test_planning_touches_nothing_of_the_users() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    x = torch.randn(8, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    graphplan.optimize(model, "100%", (x,), loss_fn=lambda y: y.pow(2).mean())
    assert torch.equal(torch.get_rng_state(), rng)
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]), k
    assert all(p.grad is None for p in model.parameters())


def test_a_saved_device_stands_in(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(256, 64)
    here = graphplan.optimize(model, "100%", (x,))
    here.device_profile.save(tmp_path / "d.json")
    there = Device.load(tmp_path / "d.json")
    assert there == here.device_profile
    plan = graphplan.optimize(model, "100%", (x,), device=there).plan
    assert plan.measured
    assert plan.cost_ns == here.plan.cost_ns
    other = graphplan.optimize(model, "100%", (torch.randn(128, 64),), device=there).plan
    assert not other.measured
    assert 0 < other.cost_ns
    assert "estimated" in str(other)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "graphplan-device-9"}', '{"format": "graphplan-device-1"}']
)
def test_device_files_that_are_wrong(text: str, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(DeviceFormatError):
        Device.load(tmp_path / "d.json")


@torch.library.custom_op("graphplan_tests::picky", mutates_args=())
def picky(x: torch.Tensor) -> torch.Tensor:
    """Refuse tensors without a negative number, as a factorisation refuses what is not definite."""
    if x.min() >= 0:
        raise RuntimeError("none is negative")
    return x.clone()


picky.register_fake(torch.empty_like)
picky.register_autograd(lambda ctx, grad: grad)


def test_an_op_that_refuses_made_up_values_is_estimated() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor([-1.0, 1.0, 2.0, 3.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return picky(self.a * x).sum()

    model, x = Picky(), torch.ones(4)
    planned = graphplan.optimize(model, "100%", (x,))
    assert not planned.plan.measured
    graphplan.verify(planned, model, (x,))


def test_an_op_with_side_effects_is_refused_by_name() -> None:
    class Factor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.eye(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.cholesky(self.a @ self.a.t() + x).sum()

    with pytest.raises(graphplan.CaptureError, match="op with side effects"):
        graphplan.optimize(Factor(), "100%", (torch.eye(4),))


class Exponential(nn.Module):
    """The exponential of a layer's result, `scale` times."""

    def __init__(self, scale: float, size: tuple[int, ...]) -> None:
        super().__init__()
        self.a, self.scale, self.size = nn.Linear(64, 64), scale, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matrix_exp((self.a(x) * self.scale).view(self.size))


@pytest.mark.parametrize(("scale", "size"), [(30.0, (-1, 2, 2)), (0.01, (-1, 2, 2)), (30.0, (-1, 1, 2, 2))])
def test_scratch_that_hangs_on_values_is_the_most(scale: float, size: tuple[int, ...]) -> None:
    """Norms of 30 had taken 64 % more than was planned, on made-up values of one half."""
    torch.manual_seed(0)
    model, x = Exponential(scale, size), torch.randn(64, 64)
    planned = graphplan.optimize(model, "100%", x, loss_fn=lambda y: y.pow(2).mean(), time_limit=2)
    measured = graphplan.measure(planned, x, lambda y: y.pow(2).mean(), runs=1)
    assert measured.peak_bytes <= planned.plan.peak_bytes


def test_bags_that_are_not_empty() -> None:
    model, x = nn.EmbeddingBag(100, 16, mode="max"), torch.randint(0, 100, (8, 16))
    planned = graphplan.optimize(model, "100%", x, loss_fn=lambda y: y.pow(2).mean(), time_limit=2)
    peak = graphplan.measure(planned, x, lambda y: y.pow(2).mean(), runs=1).peak_bytes
    assert 0.99 * planned.plan.peak_bytes <= peak <= planned.plan.peak_bytes
