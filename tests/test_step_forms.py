"""The forms of a step: sliced ops keep every bit; chunked losses and unmade gradients differ by rounding only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_step import OPTIMIZERS, plain, same, twins
from torch import Tensor, nn

import graphplan
from graphplan.choices import candidates_of
from graphplan.optimize import make_plan
from graphplan.step import slices, slicing
from graphplan.step.chunked import linear_cross_entropy
from models_zoo import MODELS


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing, "LEAST_BYTES", 1 << 10)
    monkeypatch.setattr(slices, "SLICE_BYTES", 1 << 12)


def close(model: nn.Module, other: nn.Module) -> None:
    """Equal within the rounding of float64."""
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9), name


def doubles(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() if t.is_floating_point() else t for t in tensors)


def ops_of(step: graphplan.TrainStep) -> str:
    return " ".join(str(op.node.target) for op in step.entry().step.capture.graph.ops)


@pytest.mark.slow
@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.ci) for n in ("resnet18", "unet")), "mobilenet_v2", "densenet121"]
)
def test_slices_keep_every_bit(name: str) -> None:
    entry = MODELS[name]
    example = entry.example_small()
    model, optimizer, other, its = twins(entry.build_small(), OPTIMIZERS["sgd"])
    ample = graphplan.train_step(model, entry.loss, optimizer, "100%", example.inputs, example.targets, time_limit=2)
    candidates = candidates_of(model, ample.source(example.inputs, example.targets), ample.options)
    sliced = candidates[1]  # behind the roomy form
    plan = make_plan(sliced.prepared, sliced.least(ample.options), ample.options)
    step = graphplan.apply(
        model, plan, example.inputs, loss_fn=entry.loss, example_targets=example.targets, optimizer=optimizer
    )
    assert "convolution_input_gradient" in ops_of(step)
    assert "batch_norm_backward_" in ops_of(step)
    for i in range(3):
        torch.manual_seed(i)
        ours = step(example.inputs, example.targets)
        torch.manual_seed(i)
        assert torch.equal(ours, plain(other, its, example.inputs, example.targets, entry.loss))
    same(model, optimizer, other, its)
    measured = graphplan.measure(step, example.inputs, example_targets=example.targets, runs=1)
    assert measured.peak_bytes == pytest.approx(step.plan.peak_bytes, rel=0.01)


@pytest.mark.usefixtures("small_slices")
def test_nothing_is_sliced_where_there_is_room() -> None:
    """The whole ops are faster: they run at a full budget, and count for percentages; the floor is the slices'."""
    entry = MODELS["resnet18"]
    example = entry.example_small()
    model, optimizer, other, its = twins(entry.build_small(), OPTIMIZERS["sgd"])
    step = graphplan.train_step(model, entry.loss, optimizer, "100%", example.inputs, example.targets, time_limit=2)
    assert step.entry().step.capture.roomy
    assert "graphplan.step.slices" not in ops_of(step)
    assert step.plan.budget_bytes == step.plan.baseline_peak_bytes
    least = min(step.least_peaks(example.inputs, example.targets))
    assert step.plan.minimum_peak_bytes == least
    tight = step.at_budget(least)
    tight.prepare(example.inputs, example.targets)
    assert tight.plan.peak_bytes <= least
    assert tight.plan.baseline_peak_bytes == step.plan.baseline_peak_bytes
    for _ in range(3):
        step(example.inputs, example.targets)
        plain(other, its, example.inputs, example.targets, entry.loss)
    same(model, optimizer, other, its)


class LearnedImage(nn.Module):
    """A large convolution of a parameter: its input's gradient is the parameter's."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.randn(1, 4, 40, 40))
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.image).mean(1) * x


class Joined(nn.Module):
    """Concatenations whose parts another op reads, too; of one a part is read by a sum, which asks for its strides."""

    def __init__(self, sums: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(20 if sums else 16, 4, 3, padding=1)
        self.bias = nn.Parameter(torch.zeros(4, 1, 1)) if sums else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x).relu()
        b = self.second(a).tanh()
        parts = [a, b] if self.bias is None else [a, b, self.bias.expand(len(x), -1, *x.shape[2:])]
        return self.last(torch.cat(parts, 1)).mean(1)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("build", [LearnedImage, lambda: Joined(False), lambda: Joined(True)])
def test_input_gradients_of_any_reader_are_the_same(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, optimizer, other, its = twins(build(), OPTIMIZERS["sgd"])
    x = torch.randn(3, 3, 40, 40) if isinstance(model, Joined) else torch.randn(3, 40, 40)
    y = torch.randn(3, 40, 40)
    step = graphplan.train_step(model, F.mse_loss, optimizer, "100%", x, y)
    tight = step.at_budget(step.least_peaks(x, y)[0])
    for _ in range(3):
        tight(x, y)
        plain(other, its, (x,), y, F.mse_loss)
    if isinstance(model, Joined):
        assert ("convolution_input_gradients" in tight.graph_module.code) == (model.bias is None)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert graphplan.measure(tight, x, example_targets=y, runs=1).peak_bytes <= tight.plan.budget_bytes


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(12, 20, 3, padding=1, bias=False),
        nn.Conv2d(12, 24, 1),
        nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12),
        nn.ConvTranspose2d(12, 8, 2, stride=2),
        nn.Conv1d(12, 8, 5, dilation=2),
    ],
    ids=lambda layer: type(layer).__name__ + "x".join(map(str, layer.kernel_size)),
)
def test_a_sliced_convolution_is_the_whole_one(layer: nn.Conv2d, batch: int) -> None:
    x = torch.randn(batch, 12, *(30,) * len(layer.kernel_size))
    whole = layer(x)
    options = [layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups]
    assert torch.equal(slices.convolution(x, layer.weight, layer.bias, options, whole.shape), whole)
    grad = torch.randn_like(whole)
    backward = [[layer.out_channels], *options]
    (expected, *_) = torch.ops.aten.convolution_backward.default(grad, x, layer.weight, *backward, [True, False, False])
    assert torch.equal(slices.convolution_input_gradient(grad, x.shape, layer.weight, backward), expected)
    parts = slices.convolution_input_gradients(grad, x.shape, layer.weight, backward, [5, 4, 3])
    assert all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in parts)
    assert torch.equal(torch.cat(parts, 1), expected)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(
    "name", ["unet", "gpt", "lstm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "bert", "mlp"))]
)
def test_the_form_in_less_memory_is_the_same_within_rounding(name: str) -> None:
    entry = MODELS[name]
    example = entry.example_small()
    inputs, targets = doubles(example.inputs), example.targets
    model, optimizer, other, its = twins(entry.build_small().double(), OPTIMIZERS["momentum"])
    step = graphplan.train_step(model, entry.loss, optimizer, "100%", inputs, targets, time_limit=2)
    to_the_bit, less = step.least_peaks(inputs, targets)
    tight = step.at_budget(min(to_the_bit, less))
    for i in range(3):
        torch.manual_seed(i)
        tight(inputs, targets)
        torch.manual_seed(i)
        plain(other, its, inputs, targets, entry.loss)
    close(model, other)
    measured = graphplan.measure(tight, inputs, example_targets=targets, runs=1)
    assert measured.peak_bytes <= tight.plan.budget_bytes


class Head(nn.Module):
    """A layer and a head over a vocabulary that outweighs everything else."""

    def __init__(self, width: int = 32, vocabulary: int = 4000) -> None:
        super().__init__()
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def scaled(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * F.cross_entropy(outputs, targets, ignore_index=3) + 1.0


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, scaled])
def test_a_large_vocabulary_is_chunked_when_that_lowers_the_peak(
    loss_fn: Callable[..., Tensor], tmp_path: Path
) -> None:
    x, y = torch.randn(256, 32, dtype=torch.float64), torch.arange(256) % 4000
    model, optimizer, other, its = twins(Head().double(), OPTIMIZERS["adamw"])
    step = graphplan.train_step(model, loss_fn, optimizer, "100%", x, y)
    whole, chunked = step.least_peaks(x, y)
    assert chunked < 0.5 * whole
    assert step.plan.minimum_peak_bytes == chunked
    assert "linear_cross_entropy" not in step.plan.steps
    tight = step.at_budget(chunked)
    tight.prepare(x, y)
    assert "linear_cross_entropy" in tight.plan.steps
    assert "of peak by computing the loss in chunks of rows" in str(tight.plan)
    tight.plan.save(tmp_path / "plan.json")
    tight = graphplan.apply(
        model, graphplan.Plan.load(tmp_path / "plan.json"), x, loss_fn=loss_fn, example_targets=y, optimizer=optimizer
    )
    for _ in range(5):
        assert torch.allclose(tight(x, y), plain(other, its, (x,), y, loss_fn))
    close(model, other)
    assert graphplan.verify(tight, model, x, example_targets=y).ok


def test_logits_with_another_use_are_not_chunked() -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + outputs.square().mean()

    x, y = torch.randn(256, 32), torch.arange(256)
    model = Head()
    step = graphplan.train_step(model, loss_fn, OPTIMIZERS["sgd"](model.parameters()), "100%", x, y)
    assert len(step.least_peaks(x, y)) == 1


@given(
    count=st.integers(1, 40),
    width=st.integers(1, 8),
    vocabulary=st.integers(2, 30),
    reduction=st.sampled_from(["mean", "sum"]),
    ignored=st.booleans(),
    bias=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_linear_cross_entropy(
    count: int, width: int, vocabulary: int, reduction: str, ignored: bool, bias: bool
) -> None:
    """Loss and gradients are those of the layer and the loss one after the other."""
    hidden = torch.randn(count, width, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(width, vocabulary, bias=bias, dtype=torch.float64)
    target = torch.randint(vocabulary, (count,))
    ignore = 0 if ignored and bool((target != 0).any()) else -100
    loss = F.cross_entropy(layer(hidden), target, reduction=reduction, ignore_index=ignore)
    loss.backward()
    got = linear_cross_entropy(
        hidden.detach(),
        layer.weight.detach().t(),
        layer.bias.detach() if bias else None,
        target,
        {"mean": 1, "sum": 2}[reduction],
        ignore,
        [True, True, bias],
    )
    wanted = (loss, hidden.grad, layer.weight.grad, layer.bias.grad[None] if bias else None)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b)


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adamw", "adamw fused"])
def test_gradients_that_never_exist_whole(kind: str) -> None:
    layers = nn.Sequential(nn.Linear(1100, 1000), nn.ReLU(), nn.Linear(1000, 4))
    model, optimizer, other, its = twins(layers.double(), OPTIMIZERS[kind])
    x, y = torch.randn(8, 1100, dtype=torch.float64), torch.arange(8) % 4
    step = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", x, y)
    to_the_bit, less = step.least_peaks(x, y)
    if "fused" not in kind:
        assert to_the_bit - less > 0.5 * model[0].weight.numel() * 8
    tight = step.at_budget(less)
    tight.prepare(x, y)
    if "fused" not in kind:
        assert dict(tight.plan.saved)["gradients that never exist whole"] > 0.5 * model[0].weight.numel() * 8
    for _ in range(3):
        tight(x, y)
        plain(other, its, (x,), y)
    close(model, other)
    assert graphplan.measure(tight, x, example_targets=y, runs=1).peak_bytes <= less


def test_kept_and_clipped_gradients_exist() -> None:
    model = nn.Linear(1100, 1000)
    x, y = torch.randn(8, 1100), torch.randn(8, 1000)
    for more in ({"keep_grads": True}, {"clip_value": 1.0}):
        other = copy.deepcopy(model)
        step = graphplan.train_step(other, F.mse_loss, OPTIMIZERS["sgd"](other.parameters()), "100%", x, y, **more)
        assert len(step.least_peaks(x, y)) == 1


def test_clipping_by_norm_in_two_passes() -> None:
    """Gradients are kept until the norm is known, or made twice: both to the bit, one in less memory, one faster."""
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(120, 120), nn.Tanh()) for _ in range(8)))
    x, y = torch.randn(16, 120), torch.randn(16, 120)
    model, optimizer, other, its = twins(layers, OPTIMIZERS["momentum"])
    step = graphplan.train_step(model, F.mse_loss, optimizer, "100%", x, y, clip_norm=1e-2)
    kept, twice = step.least_peaks(x, y)
    assert kept - twice > 5 * 120 * 120 * 4
    tight, ample = step.at_budget(twice), step.at_budget(kept)
    tight.prepare(x, y)
    ample.prepare(x, y)
    assert "mm__norm" in " ".join(tight.plan.steps)
    assert "mm__norm" not in " ".join(ample.plan.steps)
    assert tight.plan.cost_ns > ample.plan.cost_ns
    for i in range(6):
        (tight if i % 2 else ample)(x, y)
        its.zero_grad()
        F.mse_loss(other(x), y).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1e-2)
        its.step()
    same(model, optimizer, other, its)
    assert graphplan.measure(tight, x, example_targets=y, runs=1).peak_bytes == tight.plan.peak_bytes


@pytest.mark.parametrize("loss_fn", [F.mse_loss, F.smooth_l1_loss, lambda a, b: F.binary_cross_entropy(a.sigmoid(), b)])
def test_scalars_that_torch_keeps_in_large_memory_are_counted(loss_fn: Callable[..., Tensor]) -> None:
    x, y = torch.randn(64, 50), torch.rand(64, 50)
    model, optimizer, other, its = twins(nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50)), OPTIMIZERS["sgd"])
    step = graphplan.train_step(model, loss_fn, optimizer, "100%", x, y)
    tight = step.at_budget(step.plan.minimum_peak_bytes)
    for _ in range(3):
        assert torch.equal(tight(x, y), plain(other, its, (x,), y, loss_fn))
    same(model, optimizer, other, its)
    assert graphplan.measure(tight, x, example_targets=y, runs=1).peak_bytes == tight.plan.peak_bytes
