"""Few-bit codes: derivatives unbiased and within a level, for every function of the table; read in place of inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphplan import functions
from graphplan.capture import capture, flatten_call
from graphplan.codecs import choose_codecs
from graphplan.codecs.fewbit import BACKWARDS
from graphplan.device import Device
from graphplan.functions import SLOPES, from_slopes, group, native, quantise_slopes
from graphplan.functions.group_kernels import GROUP
from graphplan.graph import StorageKind
from graphplan.instructions import instructions_of
from graphplan.meter import peak_of
from graphplan.noise import estimate, measure_noise
from graphplan.profile import profile
from graphplan.replay import Batch
from graphplan.rewrite import rewrite
from models_zoo import MODELS
from tests.lossy_cases import all_encoded, gradients, offered
from tests.test_group import FLOATS, laid_out, steps_of

aten = torch.ops.aten
CONSTS = {"softplus": [1.5, 4.0], "elu": [0.7, 1.05, 1.3]}
FEWBIT = {"fewbit4": 4, "fewbit2": 2}
functions_ = pytest.mark.parametrize("function", SLOPES)


def domain(function: str, numel: int) -> Tensor:
    """Return what the function's backward could read, kinks and both tails among it."""
    torch.manual_seed(0)
    kinks = torch.tensor([-3.0, 3.0, 0.0, -0.0, 4.0 / 1.5, 1e-30, -60.0, 60.0, 1e9, -1e9])
    near = torch.cat((kinks, torch.nextafter(kinks, kinks + 1), torch.nextafter(kinks, kinks - 1)))
    x = torch.cat((near, 3 * torch.randn(numel)))[:numel]
    return getattr(torch, function)(x) if function in ("tanh", "sigmoid") else x


def slopes_of(function: str, x: Tensor) -> Tensor:
    return SLOPES[function](torch.ones_like(x, dtype=torch.float32), x.float(), *CONSTS.get(function, []))


def decoded(function: str, x: Tensor, bits: int, key: int = 1, slot: int = 0) -> Tensor:
    """Encode, check the bytes, and multiply ones."""
    consts = CONSTS.get(function, [])
    code = quantise_slopes(x, function, consts, bits, key, slot)
    assert (code.dtype, code.shape) == (torch.uint8, (functions.quantised_bytes(x.numel(), bits),))
    return times(function, code, bits, x, torch.ones_like(x, dtype=torch.float32))


def times(function: str, code: Tensor, bits: int, x: Tensor, grad: Tensor, over: int | None = None) -> Tensor:
    like = list(x.shape), list(x.stride())
    return from_slopes(aten.silu_backward.default, 1, over)(code, bits, *like, grad.dtype, grad.stride(), grad)  # type: ignore[no-any-return]


@functions_
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_derivatives_are_within_a_level_and_right_on_average(function: str, bits: int) -> None:
    x, keys = domain(function, 3000), 200
    slopes = slopes_of(function, x)
    step = steps_of(slopes, bits)
    errors = torch.stack([decoded(function, x, bits, key) - slopes for key in range(keys)]).double()
    assert (errors.abs() <= 1.001 * step + 1e-6).all()
    standard = step / 2 / math.sqrt(keys)
    assert (errors.mean(dim=0).abs() < 5 * standard + 1e-6).all()
    assert errors.mean().abs() < 12 * standard.mean() / math.sqrt(len(x))  # keys share stretches of the table
    found = functions.slope_error(x, function, CONSTS.get(function, []), bits)
    assert found == pytest.approx(float(errors.square().mean()), rel=0.15)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    dtype=st.sampled_from(FLOATS),
    bits=st.sampled_from((8, 4, 2)),
    mixed=st.booleans(),
    random=st.randoms(use_true_random=False),
)
def test_any_layout(shape: list[int], dtype: torch.dtype, bits: int, mixed: bool, random: Any) -> None:
    """The gradient is the op's within a level of f' times it, in its own layout; written over the same, too."""
    x, grad = (laid_out((3 * torch.randn(shape)).to(dtype), random) for _ in range(2))
    if not mixed:
        grad = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(grad)
    code = quantise_slopes(x, "gelu", [], bits, 1, 2)
    got = times("gelu", code, bits, x, grad)
    assert (got.shape, got.dtype, got.stride()) == (grad.shape, dtype, grad.stride())
    exact = aten.gelu_backward(grad.double(), x.double())
    limit = 1.3 / (2**bits - 1) * grad.double().abs() + torch.finfo(dtype).eps * (1 + exact.abs())
    assert ((got.double() - exact).abs() <= limit).all()
    over = grad.clone()
    assert times("gelu", code, bits, x, over, 0) is over or not over.numel()
    assert torch.equal(over, got)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    """The group decodes to NaN, so that a loss scaler sees it; the others are as without it."""
    x = torch.randn(4 * GROUP)
    clean = decoded("gelu", x, 4).view(4, GROUP)
    x[GROUP + 17] = bad
    got = decoded("gelu", x, 4).view(4, GROUP)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])


def test_keys() -> None:
    x, state = torch.randn(5000), torch.get_rng_state()
    code = quantise_slopes(x, "silu", [], 4, 7, 3)
    assert torch.equal(code, quantise_slopes(x, "silu", [], 4, 7, 3))
    assert not torch.equal(code, quantise_slopes(x, "silu", [], 4, 8, 3))
    assert not torch.equal(code, quantise_slopes(x, "silu", [], 4, 7, 4))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("over", [None, 0])
def test_schemas_and_fakes(over: int | None) -> None:
    x, grad = torch.randn(3, 5, 40).permute(2, 0, 1), torch.randn(40, 3, 5)
    torch.library.opcheck(quantise_slopes, (x, "gelu", [], 4, 1, 2))
    like = (list(x.shape), list(x.stride()), grad.dtype, grad.stride())
    args = (quantise_slopes(x, "gelu", [], 4, 1, 2), 4, *like, grad)
    form = from_slopes(aten.gelu_backward.default, 1, over)
    torch.library.opcheck(form, args, {"approximate": "tanh"}, test_utils=("test_schema", "test_faketensor"))


def test_both_halves_bound_the_temporaries() -> None:
    x = torch.randn(1 << 22)
    grad = torch.ones_like(x)
    code = quantise_slopes(x, "gelu", [], 4, 1, 1)
    times("gelu", code, 4, x, grad)  # what is compiled is compiled now
    encoding = peak_of(lambda: quantise_slopes(x, "gelu", [], 4, 1, 1), x.device).peak_bytes - len(code)
    decoding = peak_of(lambda: times("gelu", code, 4, x, grad), x.device).peak_bytes - 4 * x.numel()
    assert max(encoding, decoding) <= 4 * functions.CHUNK


def test_a_plan_has_room_for_what_is_held_while_a_gradient_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "serves", lambda *tensors: False)
    monkeypatch.setattr(group, "compiled", lambda *args: None)
    x = torch.randn(2000, 64)
    graph = capture(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)), (x,)).graph
    instructions = instructions_of(graph, choose_codecs("fewbit4"))
    costs = profile(graph, instructions, Device.this())
    code = quantise_slopes(x, "gelu", [], 4, 1, 1)
    alone, over = (peak_of(lambda at=at: times("gelu", code, 4, x, x, at), x.device).peak_bytes for at in (None, 0))
    (i,) = (i for i, item in enumerate(instructions.items) if item.kind == "variant" and item.takes_over is not None)
    assert costs.workspace_bytes[i] == over > alone - 4 * x.numel()


class Net(nn.Module):
    """Two linear layers with `middle` between them."""

    def __init__(self, middle: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(16, 64), middle, nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)).cumsum(-1))  # type: ignore[no-any-return]


MIDDLES = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "softplus": lambda x: F.softplus(x, 2.0, 5.0),
    "elu": lambda x: F.elu(x, 0.7),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def test_every_function_is_tried() -> None:
    assert MIDDLES.keys() == SLOPES.keys()
    assert len({b.function for b in BACKWARDS.values()}) + 1 == len(SLOPES)


@pytest.mark.parametrize("name", MIDDLES)
def test_a_step_from_derivatives(name: str) -> None:
    """Only what flows back through the function differs; over keys it is right on average."""
    model, x = Net(MIDDLES[name]), torch.randn(33, 16)
    captured, instructions = offered(model, x, list(FEWBIT))
    program = [instructions.items[p].name for p in instructions.program]
    plain_y, plain = gradients(captured, instructions, program, model, x)
    for codec in FEWBIT:
        steps = all_encoded(captured, instructions, codec)
        assert sum(s.endswith(f"__{codec}") for s in steps) == 1, steps
        y, noisy = gradients(captured, instructions, steps, model, x)
        assert torch.equal(plain_y, y)
        wrong = {n for n, g in plain.items() if not torch.equal(g, noisy[n])}
        assert wrong == {"first.weight", "first.bias"}
        batch = Batch(model, [x])
        joint = measure_noise(captured, rewrite(captured.graph, instructions, steps), batch)
        (rho,) = estimate(captured, instructions, batch).rho.values()
        assert 0.5 <= rho[codec] / joint.noise <= 2
        assert joint.bias <= 0.3


def test_less_noise_than_a_code_of_x_where_x_is_wide() -> None:
    """Derivatives stay within their bounds: with inputs as wide as a trained model's the same bytes err far less."""
    model, x = Net(F.gelu), 6 * torch.randn(64, 16)
    captured, instructions = offered(model, x, ["int4", "int2", *FEWBIT])
    noise = estimate(captured, instructions, Batch(model, [x]))
    (rho,) = (r for r in noise.rho.values() if "fewbit4" in r)
    (bias,) = (b for b in noise.bias.values() if "fewbit4" in b)
    assert rho["fewbit4"] < 0.5 * rho["int4"]
    assert rho["fewbit2"] < 0.5 * rho["int2"]
    assert bias["fewbit4"] < 0.1


@pytest.mark.parametrize(
    "middle",
    [lambda x: F.gelu(x) * x, lambda x: F.gelu(x) + F.silu(x), lambda x: F.elu(x, inplace=True), lambda x: x.exp()],
)
def test_not_where_values_are_read(middle: Any) -> None:
    """By another op, by two, or by an op whose derivative is read off what it returned."""
    _, instructions = offered(Net(middle), torch.randn(33, 16), list(FEWBIT))
    assert not instructions.encoded


@pytest.mark.parametrize("name", ["gpt", "vit", "bert"])
def test_zoo_models(name: str) -> None:
    """Every GELU's input has one; it adds no more noise than a code of x; sums are as measured."""
    entry = MODELS[name]
    torch.manual_seed(0)
    model, example = entry.build_small(), entry.example_small()
    captured = capture(model, example.inputs)
    instructions = instructions_of(captured.graph, choose_codecs(["int4", "int2", *FEWBIT]))
    wide = [n for n in captured.graph.module.graph.nodes if n.target is aten.gelu.default]
    kept = {s.id for s in captured.graph.storages if s.kind is StorageKind.ACTIVATION}
    of = {e.of: e for e in instructions.encoded if e.codec == "fewbit4"}
    assert len(of) == len(wide)
    assert of.keys() <= kept
    loss = entry.loss if example.targets is not None else lambda outputs: entry.loss(outputs, None)
    batch = Batch(model, flatten_call(example.inputs, {})[1], loss, example.targets)
    noise = estimate(captured, instructions, batch)
    for e in of.values():
        rho = noise.rho[captured.graph.storages[e.of].name]
        assert rho["fewbit4"] < 1.1 * rho["int4"]
        assert rho["fewbit2"] < 1.1 * rho["int2"]
    for codec in FEWBIT:
        steps = all_encoded(captured, instructions, codec)
        joint = measure_noise(captured, rewrite(captured.graph, instructions, steps), batch)
        predicted = sum(noise.rho[captured.graph.storages[s].name][codec] for s in of)
        assert 0.7 <= predicted / joint.noise <= 1.4
        assert joint.bias <= 0.3  # by two keys
