"""Lossy codes: exact bytes, unbiased, bounded errors on any shape, strides, dtype and values; small temporaries."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphplan import functions
from graphplan.functions import group
from graphplan.functions.compiled import compiled, has_compiler
from graphplan.functions.group import HALF
from graphplan.functions.group_kernels import GROUP
from graphplan.meter import peak_of

ops = torch.ops.graphplan
BITS = (8, 4, 2, HALF)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
shapes = st.lists(st.integers(0, 12), min_size=1, max_size=4)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Let a few groups make several chunks, and leave the compiler out, except where it matters."""
    if not {"test_both_halves_bound_the_temporaries", "test_compiled_kernels"} & {request.node.originalname}:
        monkeypatch.setattr(group, "CHUNK", 2 * GROUP)
        for name in ("PIECE", "PIECE_OF_BYTES", "AHEAD"):
            monkeypatch.setattr(group, name, 2 * GROUP)
        monkeypatch.setattr(group, "compiled", lambda *args: None)


def round_trip(x: Tensor, bits: int, key: int = 1, slot: int = 0) -> Tensor:
    """Encode, check the bytes, and decode."""
    code = ops.quantise(x, bits, key, slot)
    assert code.dtype is torch.uint8
    assert code.shape == (functions.quantised_bytes(x.numel(), bits),)
    back = ops.dequantise(code, bits, x.shape, x.stride(), x.dtype)
    assert (back.shape, back.stride(), back.dtype) == (x.shape, x.stride(), x.dtype)
    return back  # type: ignore[no-any-return]


def laid_out(x: Tensor, random: Any) -> Tensor:
    """Return x with its strides permuted: dense, not contiguous."""
    order = list(range(x.dim()))
    random.shuffle(order)
    return x.permute(order).contiguous().permute([order.index(i) for i in range(len(order))])


def steps_of(x: Tensor, bits: int) -> Tensor:
    """Return the distance between levels at each element, float64, in storage order."""
    flat = torch.as_strided(x, (x.numel(),), (1,)).double()
    if bits == HALF:
        return torch.ldexp(torch.ones_like(flat), torch.frexp(flat)[1] - 8).clamp_min(1e-38)
    groups = flat.split(GROUP)
    return torch.cat([((g.max() - g.min()) / (2**bits - 1)).expand(len(g)) for g in groups]) if len(flat) else flat


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(FLOATS),
    bits=st.sampled_from(BITS),
    magnitude=st.integers(-36, 36),
    offset=st.sampled_from((0.0, 1.0, -1e4)),
    random=st.randoms(use_true_random=False),
)
def test_errors_are_below_one_step(
    shape: list[int], dtype: torch.dtype, bits: int, magnitude: int, offset: float, random: Any
) -> None:
    x = (torch.randn(shape) + offset) * 10.0 ** (magnitude if dtype is not torch.float16 else magnitude // 9)
    x = laid_out((x.clamp(-6e4, 6e4) if dtype is torch.float16 else x.clamp(-1e38, 1e38)).to(dtype), random)
    back = round_trip(x, bits)
    if not x.numel():
        return
    a, b = (torch.as_strided(t, (t.numel(),), (1,)).double() for t in (x, back))
    step = steps_of(x, bits)
    subnormal = (2**bits if bits != HALF else 1) * torch.finfo(torch.float32).tiny  # a range of this is none
    rounding = torch.finfo(dtype).eps * (a.abs() + 4 * step) + 1e-6 * a.abs().max() + subnormal
    assert ((a - b).abs() <= 1.001 * step + rounding).all()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 5 * GROUP) | st.integers(group.SPAN - 9, group.SPAN + 300),
    bits=st.sampled_from(BITS),
    magnitude=st.integers(-44, 37),
    offset=st.sampled_from((0.0, 1.0, -1.0, 5.0, -5.0)),
    seed=st.integers(0, 1 << 40),
)
def test_loops_write_what_plain_torch_does(size: int, bits: int, magnitude: int, offset: float, seed: int) -> None:
    """Bit for bit both ways, but for which NaN a NaN is: groups of one sign, of both, tiny, wide, and not finite."""
    random = torch.Generator().manual_seed(seed)
    x = (torch.randn(size, generator=random) + offset) * 10.0**magnitude
    for value in (math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0):
        if size and seed % 3:
            x[int(torch.randint(size, (1,), generator=random))] = value
    found = []
    for by in (compiled, lambda *args: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(group, "compiled", by)
            code = ops.quantise(x, bits, seed, 3)
            found.append((code, ops.dequantise(code, bits, x.shape, x.stride(), x.dtype)))
    (code, back), (plain_code, plain_back) = found
    if bits == HALF:
        code, plain_code = (c.view(torch.bfloat16).float().nan_to_num(12345.0) for c in (code, plain_code))
    assert torch.equal(code.view(torch.uint8), plain_code.view(torch.uint8))
    same = (back.view(torch.int32) == plain_back.view(torch.int32)) | (back.isnan() & plain_back.isnan())
    assert same.all()


@pytest.mark.parametrize("bits", BITS)
def test_right_on_average(bits: int) -> None:
    """Over keys the decoded values are x: the error of the mean shrinks with the root of their number."""
    torch.manual_seed(0)
    x, keys = torch.randn(3000) * 5 + 2, 400
    errors = torch.stack([round_trip(x, bits, key) - x for key in range(keys)]).double()
    largest = steps_of(x, bits) / 2 / math.sqrt(keys)  # standard error half way between two levels
    relative = errors.mean(dim=0).abs() / largest
    assert relative.mean() < 0.75
    assert relative.max() < 5
    assert errors.mean().abs() < 5 * largest.mean() / math.sqrt(len(x))


def test_the_mean_square_error_is_the_theory_s() -> None:
    """s^2 / 6 for uniform values: the variance of stochastic rounding (nearest: s^2 / 12)."""
    torch.manual_seed(0)
    x = torch.rand(1 << 18)
    for bits in (8, 4, 2):
        found = (round_trip(x, bits) - x).square().mean()
        assert found == pytest.approx(steps_of(x, bits).square().mean().item() / 6, rel=0.02)


@pytest.mark.parametrize("bits", BITS)
def test_one_key_one_code_and_no_random_number(bits: int) -> None:
    x = torch.randn(1000, 700)
    state = torch.get_rng_state()
    code = ops.quantise(x, bits, 7, 3)
    assert torch.equal(code, ops.quantise(x, bits, 7, 3))
    assert not torch.equal(code, ops.quantise(x, bits, 8, 3))
    assert not torch.equal(code, ops.quantise(x, bits, 7, 4))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen(bits: int, bad: float) -> None:
    """The whole group decodes to NaN, so that a loss scaler sees it; its neighbours are as without it."""
    x = torch.randn(4 * GROUP)
    clean = round_trip(x, bits)
    x[GROUP + 17] = bad
    back = round_trip(x, bits).view(4, GROUP)
    assert back[1].isnan().all()
    assert torch.equal(back[[0, 2, 3]], clean.view(4, GROUP)[[0, 2, 3]])
    wide = torch.tensor([3e38, -3e38]).repeat(GROUP // 2)
    assert round_trip(wide, bits).isnan().all()


def test_bfloat16_keeps_what_is_not_finite() -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 3.4e38, -3.4e38, 1e-45, 1.0])
    back = round_trip(x, HALF)
    assert back[0].isnan()
    assert torch.equal(back[1:3], x[1:3])
    assert back[3:].isfinite().all() or back[5:7].isinf().any()
    assert torch.equal(back[3:5].signbit(), x[3:5].signbit())
    assert back[8] == 1.0


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_constant_groups_are_exact(bits: int) -> None:
    for value in (0.0, 1.5, -3e38, 1e-44):
        x = torch.full((700,), value)
        assert torch.equal(round_trip(x, bits), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", ["loops", "torch.compile", "plain torch"])
@pytest.mark.parametrize("bits", BITS)
def test_both_halves_bound_the_temporaries(
    bits: int, by: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what they read and write they hold less than one chunk in float32, compiled or not, by the meter."""
    x = torch.randn(group.MOST).to(dtype)
    if bits == HALF and dtype is torch.bfloat16:
        pytest.skip("no code")
    if by != "loops":
        monkeypatch.setattr(group, "_loop", lambda *args: None)
    if by == "plain torch":
        monkeypatch.setattr(group, "compiled", lambda *args: None)
    else:
        functions.warm_up(x.numel(), bits, x.dtype, x.device)
    for peak_bytes, kept in (
        (peak_of(lambda: ops.quantise(x, bits, 1, 1), x.device).peak_bytes, functions.quantised_bytes(x.numel(), bits)),
        (_decoding(x, bits), x.numel() * x.element_size()),
    ):
        assert peak_bytes - kept <= 4 * functions.CHUNK


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_pieces_give_the_same_code(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(group, "compiled", lambda *args: None)
    x = torch.randn(2 * group.AHEAD + 7 * group.SPAN + 300) * 3
    code, parts = ops.quantise(x, bits, 1, 1), []
    for start in range(0, x.numel(), group.SPAN):
        flat = x[start : start + group.SPAN]
        own = torch.empty(functions.quantised_bytes(flat.numel(), bits), dtype=torch.uint8)
        group.encode(own, flat.numel(), bits, group.mix(1, 1), lambda a, b, flat=flat: flat[a:b], x.dtype)
        parts.append(group.code_parts(own, flat.numel(), bits))
    for found, expected in zip(group.code_parts(code, x.numel(), bits), zip(*parts, strict=True), strict=True):
        assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_compiled_kernels(bits: int, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Numba makes of a kernel, or Inductor, gives the codes of the kernel itself, to the bit."""
    if not loops:
        if not has_compiler(torch.device("cpu")):
            pytest.skip("no compiler")
        monkeypatch.setattr(group, "_loop", lambda *args: None)
    chunk, span, most = functions.CHUNK, group.SPAN, group.MOST
    sizes = (
        chunk + 1,
        chunk + span,
        3 * chunk + 1001,
        *range(2 * chunk - 1, 2 * chunk + 2),
        most + span,
        most + 256,
        most + 7,
    )
    dtypes = [torch.float32] * len(sizes) + ([torch.bfloat16] if bits != HALF else [])
    for size, dtype in zip((*sizes, sizes[0]), dtypes, strict=False):
        x = (torch.randn(size) * 3 + 1).to(dtype)
        x[7] = math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # the kernel's own, not its compiler's
            code = ops.quantise(x, bits, 3, 4)
            back = ops.dequantise(code, bits, x.shape, x.stride(), dtype)
        with monkeypatch.context() as patch:
            patch.setattr(group, "compiled", lambda *args: None)
            plain = ops.quantise(x, bits, 3, 4)
            again = ops.dequantise(code, bits, x.shape, x.stride(), dtype)
        if bits == HALF:  # which NaN ATen writes depends on the place
            code, plain = (c.view(torch.bfloat16).nan_to_num(12345.0) for c in (code, plain))
            back, again = back.nan_to_num(12345.0), again.nan_to_num(12345.0)
        assert torch.equal(code.view(torch.uint8), plain.view(torch.uint8))
        assert torch.equal(back.view(torch.int16), again.view(torch.int16))


@pytest.mark.parametrize("bits", BITS)
def test_nothing_is_compiled_after_the_warm_up(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was compiled anew at its first call inside an op, in the middle of a step."""
    if not has_compiler(torch.device("cpu")):
        pytest.skip("no compiler")
    monkeypatch.setattr(group, "_loop", lambda *args: None)
    largest = 9 * functions.CHUNK
    functions.warm_up(largest, bits, torch.float32, torch.device("cpu"))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for size in (largest, 2 * functions.CHUNK + 17, 3 * functions.CHUNK + group.SPAN):
        x = torch.randn(size)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                ops.dequantise(ops.quantise(x, bits, 3, 4), bits, x.shape, x.stride(), x.dtype)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_a_wrong_compiler_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, trial = group._kernel("encode", 8), group._trial("encode", 8, torch.float32, False)

    def wrong(made: Any, **options: Any) -> Any:
        def run(x: Tensor, seed: Tensor, codes: Tensor) -> Any:
            found = made(x, seed, codes)
            codes[0, 0] ^= 1
            return found

        return run

    def broken(made: Any, **options: Any) -> Any:
        def run(*args: Any) -> Any:
            raise RuntimeError("no such instruction")

        return run

    for compiler, words in ((wrong, "differ"), (broken, "no such instruction")):
        monkeypatch.setattr(torch, "compile", compiler)
        with pytest.warns(RuntimeWarning, match=words):
            assert compiled.__wrapped__(kernel, trial, torch.device("cpu"), kernel) is None
    monkeypatch.setattr(torch, "compile", lambda made, **options: made)
    fast = compiled.__wrapped__(kernel, trial, torch.device("cpu"), kernel)
    x, seed, codes = trial(torch.device("cpu"))
    least, *_ = kernel(x, seed, codes)
    fast.run = broken(None)  # later, in the middle of a step
    again = torch.zeros_like(codes)
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        found, *_ = fast(x, seed, again)
    assert torch.equal(found.nan_to_num(), least.nan_to_num())
    assert torch.equal(again, codes)
    assert fast.run is kernel


def _decoding(x: Tensor, bits: int) -> int:
    code = ops.quantise(x, bits, 1, 1)
    return peak_of(lambda: ops.dequantise(code, bits, x.shape, x.stride(), x.dtype), x.device).peak_bytes


@pytest.mark.parametrize("bits", BITS)
def test_the_custom_ops_are_sound(bits: int) -> None:
    """Schema, fake kernel (shapes, strides, dtypes) and no hidden aliasing, by torch's own checker."""
    x = torch.randn(3, 5, 40).permute(2, 0, 1)
    torch.library.opcheck(ops.quantise.default, (x, bits, 1, 2))
    code = ops.quantise(x, bits, 1, 2)
    torch.library.opcheck(ops.dequantise.default, (code, bits, x.shape, x.stride(), x.dtype))
