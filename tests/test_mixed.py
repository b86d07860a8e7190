"""Channel-wise mixed bits: exact bytes, unbiased, dealt out for the least error; a step and a plan that use them."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphplan
from graphplan import functions
from graphplan.functions import mixed
from graphplan.functions.group import SIDE_BYTES
from graphplan.functions.group_kernels import GROUP
from graphplan.functions.mixed import PIECE, WIDTHS, deal_bits
from graphplan.meter import peak_of
from graphplan.noise import estimate, measure_noise
from graphplan.replay import Batch
from graphplan.rewrite import rewrite
from tests.lossy_cases import all_encoded, conv_net, gradients, images, offered, token_loss
from tests.test_group import FLOATS

MEAN = 3


def planes_of(x: Tensor) -> tuple[int, int, int]:
    n, c, h, w = x.shape
    return (n, c, h * w) if x.is_contiguous() else (n * h * w, c, 1)


def round_trip(x: Tensor, key: int = 1, slot: int = 0, mean: int = MEAN) -> tuple[Tensor, Tensor]:
    """Encode, check the bytes, decode; return the bits of each channel, too."""
    planes = planes_of(x)
    code = functions.quantise_channels(x, planes, mean, key, slot)
    assert (code.dtype, code.shape) == (torch.uint8, (functions.mixed_bytes(planes, mean),))
    back = functions.dequantise_channels(code, planes, x.shape, x.stride(), x.dtype)
    assert (back.shape, back.stride(), back.dtype) == (x.shape, x.stride(), x.dtype)
    return back, code[: x.shape[1]].long()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 12), st.integers(1, 40)),
    dtype=st.sampled_from(FLOATS),
    last=st.booleans(),
    spread=st.integers(0, 3),
)
def test_errors_are_below_one_step_of_the_channel(
    shape: tuple[int, int, int, int], dtype: torch.dtype, last: bool, spread: int
) -> None:
    x = torch.randn(shape) * torch.logspace(0, -spread, shape[1])[:, None, None] + 1
    x = x.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
    back, bits = round_trip(x)
    assert bits.sum() <= MEAN * shape[1]
    assert set(bits.tolist()) <= set(WIDTHS)
    wide = (x.amax(dim=(0, 2, 3)) - x.amin(dim=(0, 2, 3))).double()
    step = wide / (2**bits - 1)
    rounding = 2 * torch.finfo(dtype).eps * x.double().abs().max()
    assert ((back.double() - x.double()).abs() <= 1.001 * step[:, None, None] + rounding).all()


def test_right_on_average_and_repeated_by_its_key() -> None:
    x, keys = torch.randn(3, 8, 20, 20) * torch.logspace(0, -2, 8)[:, None, None], 200
    wide = x.amax(dim=(0, 2, 3)) - x.amin(dim=(0, 2, 3))
    found = torch.stack([round_trip(x, key)[0] - x for key in range(keys)]).double()
    _, bits = round_trip(x)
    assert set(bits.tolist()) == {2, 4, 8} or bits.sum() == MEAN * 8
    standard = (wide / (2**bits - 1) / 2 / math.sqrt(keys))[:, None, None]
    assert (found.mean(dim=0).abs() < 5 * standard).all()
    assert torch.equal(round_trip(x, 7)[0], round_trip(x, 7)[0])
    assert not torch.equal(round_trip(x, 7)[0], round_trip(x, 8)[0])
    assert not torch.equal(round_trip(x, 7, 1)[0], round_trip(x, 7, 2)[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=5), st.sampled_from((2, 3, 4, 6)))
def test_bits_are_dealt_for_the_least_error(ranges: list[float], mean: int) -> None:
    """Against every allocation: no worse than the best by more than one channel's step."""
    energy = np.square(ranges)

    def error(bits: tuple[int, ...]) -> float:
        return float(sum(e / (2**b - 1) ** 2 for e, b in zip(energy, bits, strict=True)))

    bits = deal_bits(np.array(ranges), mean)
    assert bits.sum() <= mean * len(ranges)
    best = min(error(b) for b in itertools.product(WIDTHS, repeat=len(ranges)) if sum(b) <= mean * len(ranges))
    assert error(tuple(bits.tolist())) <= best + energy.max(initial=0.0) * (1 / 9 - 1 / 225) + 1e-9


def test_wide_channels_have_more_bits_and_err_less() -> None:
    """Where ranges differ by channel it beats 4 bits for all, in fewer bytes."""
    torch.manual_seed(0)
    x = torch.relu(torch.randn(8, 32, 28, 28)) * torch.logspace(0, -3, 32)[:, None, None]
    back, bits = round_trip(x)
    assert (bits[:-1] >= bits[1:]).all()
    same = functions.dequantise(functions.quantise(x, 4, 1, 0), 4, x.shape, x.stride(), x.dtype)
    assert (back - x).square().sum() < 0.6 * (same - x).square().sum()
    assert functions.mixed_bytes(planes_of(x), MEAN) < functions.quantised_bytes(x.numel(), 4)


def test_bytes() -> None:
    assert functions.mixed_bytes((2, 5, 300), 3) == 8 + 5 * 3 * (GROUP * 3 // 8 + SIDE_BYTES)  # 600 of 768 elements
    many = PIECE // 300
    assert functions.mixed_bytes((many + 1, 1, 300), 4) == 4 + (PIECE // GROUP + 2) * (GROUP // 2 + SIDE_BYTES)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    x = torch.randn(2, 4, 16, 16)
    x[1, 2, 3, 3] = bad
    back, _ = round_trip(x)
    assert back[1, 2].isnan().all()
    assert not back[:, [0, 1, 3]].isnan().any()


@pytest.mark.parametrize("last", [False, True])
def test_soundness_and_temporaries(last: bool) -> None:
    x = torch.randn(3, 5, 8, 6).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    torch.library.opcheck(functions.quantise_channels, (x, planes_of(x), MEAN, 1, 2))
    code = functions.quantise_channels(x, planes_of(x), MEAN, 1, 2)
    torch.library.opcheck(functions.dequantise_channels, (code, planes_of(x), x.shape, x.stride(), x.dtype))
    large = torch.randn(16, 64, 64, 64)
    code = functions.quantise_channels(large, planes_of(large), MEAN, 1, 2)
    encoding = peak_of(lambda: functions.quantise_channels(large, planes_of(large), MEAN, 1, 2), x.device).peak_bytes
    decoding = peak_of(
        lambda: functions.dequantise_channels(code, planes_of(large), large.shape, large.stride(), large.dtype),
        x.device,
    ).peak_bytes
    assert encoding - len(code) <= 4 * functions.CHUNK
    assert decoding - 4 * large.numel() <= 4 * functions.CHUNK


def test_a_step_and_its_noise() -> None:
    """Convolutions' inputs alone have it; the weights' gradients alone differ; noise adds up as predicted."""
    model, (x, targets) = conv_net(), images()
    captured, instructions = offered(model, x, ["mixed3"])
    program = [instructions.items[p].name for p in instructions.program]
    y, plain = gradients(captured, instructions, program, model, x)
    steps = all_encoded(captured, instructions, "mixed3")
    assert sum(s.endswith("__mixed3") for s in steps) == 3
    noisy_y, noisy = gradients(captured, instructions, steps, model, x)
    assert torch.equal(y, noisy_y)
    assert {n for n, g in plain.items() if not torch.equal(g, noisy[n])} == {"3.weight", "6.weight", "9.weight"}
    batch = Batch(model, [x], token_loss, targets)
    noise = estimate(captured, instructions, batch)
    joint = measure_noise(captured, rewrite(captured.graph, instructions, steps), batch)
    assert 0.7 <= sum(r["mixed3"] for r in noise.rho.values()) / joint.noise <= 1.4
    assert joint.bias <= 0.3
    assert mixed.WIDTHS[0] < MEAN < mixed.WIDTHS[-1]


def test_a_plan_that_uses_it() -> None:
    """With channels of unequal ranges, as trained norms have, it is what an exact solver takes between 4 bits and 2."""
    model, (x, targets) = conv_net(), images()
    random = torch.Generator().manual_seed(1)
    for norm in (m for m in model if isinstance(m, torch.nn.BatchNorm2d)):
        norm.weight.data.copy_(torch.exp(0.7 * torch.randn(norm.weight.shape, generator=random)))
    captured, instructions = offered(model, x, ["mixed3", "int4", "int2"])
    batch = Batch(model, [x], token_loss, targets)
    noise = estimate(captured, instructions, batch)
    sizes = {(captured.graph.storages[e.of].name, e.codec): e.nbytes for e in instructions.encoded if e.lossy}
    names = [name for name, codec in sizes if codec == "mixed3"]
    assert names
    for name in names:
        narrow, mixed_, wide = (sizes[name, codec] for codec in ("int2", "mixed3", "int4"))
        part = (mixed_ - narrow) / (wide - narrow)
        line = (1 - part) * noise.rho[name]["int2"] + part * noise.rho[name]["int4"]
        assert noise.rho[name]["mixed3"] < 0.6 * line, name
    here = graphplan.optimize(model, "100%", (x,), codecs=["mixed3", "int4", "int2"], noise=noise, time_limit=3)
    device = here.device_profile
    ours = [k for k, s in device.samples.items() if s.target in ("encode", "decode") or s.target.endswith(":variant")]
    device.samples.update({k: replace(device.samples[k], cost_ns=1) for k in ours})
    plan, cap = here.plan, sum(noise.rho[name]["mixed3"] for name in names)
    budget = (2 * plan.minimum_peak_bytes + plan.baseline_peak_bytes) // 3
    planned = graphplan.optimize(
        model, budget, (x,), codecs=["mixed3", "int4", "int2"], noise=noise, gradient_noise=cap, device=device,
        time_limit=3, loss_fn=token_loss, example_targets=targets,
    )  # fmt: skip
    assert "mixed3" in {d.codec for d in planned.plan.decisions.values()}
    graphplan.verify(planned, model, (x,), loss_fn=token_loss, example_targets=targets)


def test_images_larger_than_a_chunk() -> None:
    """What compiled kernels serve is nothing to this codec: no width of its mean is one of theirs."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d
    model = torch.nn.Sequential(conv(3, 16, 3, padding=1), torch.nn.GELU(), conv(16, 4, 3, padding=1))
    x = torch.randn(2, 3, 96, 96)
    assert 2 * 16 * 96 * 96 > functions.CHUNK
    call = {"loss_fn": lambda y: y.square().mean()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        planned = graphplan.optimize(model, "90%", (x,), codecs=("mixed3",), time_limit=2, **call)
    graphplan.verify(planned, model, (x,), **call)
