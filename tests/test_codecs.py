"""The functions that codecs call: exact to the bit on any shape, strides and values; small temporaries."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from graphplan import functions
from graphplan.codecs import CODECS, choose_codecs
from graphplan.codecs.readers import READERS
from graphplan.functions import bits, pool
from graphplan.functions.stand_in import out_form
from graphplan.meter import peak_of

aten = torch.ops.aten
TRUE: tuple[list[str], list[float]] = (["true"], [])
INF, NAN = math.inf, math.nan
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SPECIAL = torch.tensor(
    [NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 0.1, -0.1, 0.7, 1.0, -1.0, 3.0, -3.0, 6.0, 7.0, 3e38]
)
shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4)
layouts = st.randoms(use_true_random=False)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Let a few elements make several chunks, except where memory is measured."""
    if "bound_the_temporaries" not in request.node.name:
        monkeypatch.setattr(bits, "CHUNK", 32)
        monkeypatch.setattr(pool, "POOL_BLOCK", 32)


@pytest.fixture(params=["numpy", "torch"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run what the functions do on a CPU, and what they do elsewhere."""
    if request.param == "torch":
        monkeypatch.setattr(bits, "by_numpy", lambda x: False)
    return str(request.param)


def laid_out(x: Tensor, random: Any) -> Tensor:
    """Return x with the same values and its strides permuted: dense, not contiguous."""
    order = list(range(x.dim()))
    random.shuffle(order)
    inverse = [order.index(i) for i in range(len(order))]
    return x.permute(order).contiguous().permute(inverse)


def odd_values(shape: list[int], dtype: torch.dtype, random: Any) -> Tensor:
    """Return special values and NaNs with a payload, laid out anyhow."""
    n = math.prod(shape)
    picked = SPECIAL[torch.tensor([random.randrange(len(SPECIAL)) for _ in range(n)], dtype=torch.int64)]
    x = picked.to(dtype).view(-1)
    if n and random.random() < 0.5:  # the quiet bit and the lowest
        word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        x.view(word)[random.randrange(n)] = torch.tensor([NAN], dtype=dtype).view(word).item() | 1
    return laid_out(x.view(shape), random)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors agree in dtype, shape, strides and every bit, NaNs included."""
    if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def like_of(x: Tensor) -> functions.Like:
    return x.dtype, tuple(x.shape), tuple(x.stride())


@pytest.mark.usefixtures("by")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes, layouts)
def test_bits_round_trip(shape: list[int], random: Any) -> None:
    mask = laid_out(torch.rand(shape) > 0.5, random)
    packed = functions.pack_sides(mask, *TRUE)
    assert packed.numel() == functions.packed_bytes(mask.numel()) == (mask.numel() + 7) // 8
    assert same_bits(functions.unpack_bits(packed, mask.shape, mask.stride()), mask)


# Constants to try with every op that asks for a side.
SIDED: dict[Any, list[tuple[Any, ...]]] = {
    aten.threshold_backward.default: [(0,), (0.1,), (-0.7,), (INF,), (-INF,)],
    aten.hardtanh_backward.default: [(0, 6), (-0.1, 0.1), (-INF, 0.3), (0.3, INF), (2e4, INF), (-INF, INF)],
    aten.leaky_relu_backward.default: [(0.1, False), (0.1, True), (0.0, False), (1.0, False), (-0.5, False)],
    aten.hardsigmoid_backward.default: [()],
    **{op: [(0,), (0.1,), (-0.7,), (INF,), (-INF,)] for op in READERS if "Scalar" in str(op)},
}


def run_both(op: Any, x: Tensor, grad: Tensor, consts: tuple[Any, ...], *, over: bool = False) -> tuple[Tensor, Tensor]:
    """Return what `op` gives on x, and on its sides packed as the second of two."""
    (reads,) = READERS[op]
    args = (x, *consts) if reads.argument == 0 else (grad, x, *consts)
    own = [float(args[i]) for i in reads.consts]
    want = op(*args)
    packed = functions.pack_sides(x, ["positive", reads.side], own)
    values = functions.SIDES[reads.side].values(*own)
    return want, on_sides(op, reads.argument, args, packed, 1, values, x, want, over)


def on_sides(
    op: Any, at: int, args: Any, packed: Tensor, part: int, values: Any, x: Tensor, want: Tensor, over: bool = False
) -> Tensor:
    """Return what `op` gives on the sides of x; a fake run must foretell its geometry."""
    form = functions.from_sides(op, at, 0 if over else None)
    given = (packed, part, list(values), *like_of(x), want.dtype, want.stride(), *args[:at], *args[at + 1 :])
    assert likes(faked(form, given)) == [like_of(want)]
    return form(*given)  # type: ignore[no-any-return]


def faked(op: Any, args: tuple[Any, ...]) -> Any:
    """Return what the op's fake kernel says will come out."""
    with FakeTensorMode() as mode:
        return op(*tree_map_only(Tensor, mode.from_tensor, args))


def likes(results: Any) -> list[functions.Like | None]:
    return [None if t is None else like_of(t) for t in tree_leaves(results)]


@pytest.mark.parametrize("op", SIDED, ids=str)
@pytest.mark.usefixtures("by")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes, dtype=st.sampled_from(FLOATS), random=layouts, data=st.data())
def test_ops_on_sides(op: Any, shape: list[int], dtype: torch.dtype, random: Any, data: Any) -> None:
    """Equal to the bit to the op on the activation itself: NaN, infinities, signed zeros, other strides included."""
    x = odd_values(shape, dtype, random)
    if op is aten.hardtanh_backward.default:
        x = torch.where(x.isnan(), 1, x)  # see the next test
    grad = odd_values(shape, dtype, random)
    apart = data.draw(st.booleans())
    grad = grad if apart else torch.empty_like(x).copy_(grad)
    consts = data.draw(st.sampled_from(SIDED[op]))
    want, got = run_both(op, x, grad, consts)
    assert same_bits(want, got)
    if READERS[op][0].argument == 1 and grad.stride() == want.stride():
        over = grad.clone()
        want, got = run_both(op, x, over, consts, over=True)
        assert got.data_ptr() == over.data_ptr()
        assert same_bits(want, got)


def test_hardtanh_of_nan() -> None:
    """ATen's kernel blocks a NaN in its vector body and passes it in the scalar tail of a thread's share."""
    x, grad = torch.full((21,), NAN), torch.arange(1.0, 22.0)
    itself, ours = run_both(aten.hardtanh_backward.default, x, grad, (0, 6))
    assert set((itself / grad).tolist()) <= {0.0, 1.0}
    assert (ours == 0).all()
    assert (itself[:16] == 0).all()


@settings(max_examples=100, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(FLOATS), random=layouts)
def test_elementwise_ops_on_a_bool(shape: list[int], dtype: torch.dtype, random: Any) -> None:
    mask = laid_out(torch.rand(shape) > 0.5, random)
    grad = torch.empty_like(mask, dtype=dtype).copy_(odd_values(shape, dtype, random))
    packed = functions.pack_sides(mask, *TRUE)
    zero = torch.zeros((), dtype=dtype)
    for op, at, args in (
        (aten.native_dropout_backward.default, 1, (grad, mask, 1.25)),
        (functions.dropout_backward, 1, (grad, mask, 1.1)),
        (aten.where.self, 0, (mask, grad, zero)),
        (aten.where.self, 0, (mask, zero, grad)),
        (aten.masked_fill.Scalar, 1, (grad, mask, -1.0)),
        (aten.logical_not.default, 0, (mask,)),
    ):
        want = op(*args)
        got = on_sides(op, at, args, packed, 0, (False, True), mask, want)
        assert same_bits(want, got), op


def pooled(x: Tensor, op: Any, *args: Any) -> tuple[Tensor, ...]:
    y = op(x, *args)
    return tuple(torch.randn_like(t) if t.is_floating_point() else t for t in (y if isinstance(y, tuple) else (y,)))


def conv_args(x: Tensor, mask: list[bool]) -> tuple[Any, ...]:
    weight = torch.randn(5, x.shape[1], 3, 3)
    grad = torch.randn_like(aten.convolution(x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1))
    return grad, x, weight, [5], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask


def nll_args(x: Tensor) -> tuple[Any, ...]:
    target = torch.randint(0, x.shape[1], (x.shape[0], *x.shape[2:]))
    return torch.ones(()), x, target, None, 1, -100, torch.tensor(float(target.numel()))


def pad_args(x: Tensor, width: int) -> tuple[Any, ...]:
    return torch.randn([n + (2 if d >= x.dim() - width else 0) for d, n in enumerate(x.shape)]), x, [1, 1] * width


IMAGE, VOLUME = (2, 3, 7, 9), (2, 3, 5, 6, 7)
# op -> the shape of what it reads for its shape alone, and its arguments for such a tensor
SHAPED: dict[Any, list[tuple[tuple[int, ...], Callable[[Tensor], tuple[Any, ...]]]]] = {
    aten.avg_pool2d_backward.default: [
        (IMAGE, lambda x: (*pooled(x, aten.avg_pool2d, [3], [2], [1]), x, [3], [2], [1], False, True, None))
    ],
    aten.avg_pool3d_backward.default: [
        (VOLUME, lambda x: (*pooled(x, aten.avg_pool3d, [2]), x, [2], [], [0], False, True, None))
    ],
    aten._adaptive_avg_pool2d_backward.default: [(IMAGE, lambda x: (*pooled(x, aten._adaptive_avg_pool2d, [3, 4]), x))],
    aten._adaptive_avg_pool3d_backward.default: [
        (VOLUME, lambda x: (*pooled(x, aten._adaptive_avg_pool3d, [3, 4, 2]), x))
    ],
    aten.max_pool2d_with_indices_backward.default: [
        (IMAGE, lambda x: _max_args(x, aten.max_pool2d_with_indices, [3, 3], [2, 2], [1, 1], [1, 1], False))
    ],
    aten.max_pool3d_with_indices_backward.default: [
        (VOLUME, lambda x: _max_args(x, aten.max_pool3d_with_indices, [2] * 3, [2] * 3, [0] * 3, [1] * 3, False))
    ],
    aten.adaptive_max_pool2d_backward.default: [(IMAGE, lambda x: _adaptive_args(x, aten.adaptive_max_pool2d, [3, 4]))],
    aten.adaptive_max_pool3d_backward.default: [
        (VOLUME, lambda x: _adaptive_args(x, aten.adaptive_max_pool3d, [3, 4, 2]))
    ],
    aten.fractional_max_pool2d_backward.default: [(IMAGE, lambda x: _fractional_args(x, aten.fractional_max_pool2d))],
    aten.fractional_max_pool3d_backward.default: [(VOLUME, lambda x: _fractional_args(x, aten.fractional_max_pool3d))],
    aten.reflection_pad1d_backward.default: [((2, 3, 7), lambda x: pad_args(x, 1))],
    aten.reflection_pad2d_backward.default: [(IMAGE, lambda x: pad_args(x, 2))],
    aten.reflection_pad3d_backward.default: [(VOLUME, lambda x: pad_args(x, 3))],
    aten.replication_pad1d_backward.default: [((2, 3, 7), lambda x: pad_args(x, 1))],
    aten.replication_pad2d_backward.default: [(IMAGE, lambda x: pad_args(x, 2))],
    aten.replication_pad3d_backward.default: [(VOLUME, lambda x: pad_args(x, 3))],
    aten.nll_loss_backward.default: [((6, 5), nll_args)],
    aten.nll_loss2d_backward.default: [(IMAGE, nll_args)],
    aten.convolution_backward.default: [
        (IMAGE, lambda x: conv_args(x, [True, False, True])),
        ((5, 3, 3, 3), lambda w: _weight_args(w)),
    ],
}


def _max_args(x: Tensor, op: Any, *args: Any) -> tuple[Any, ...]:
    grad, indices = pooled(x, op, *args)
    return grad, x, *args, indices


def _adaptive_args(x: Tensor, op: Any, size: list[int]) -> tuple[Any, ...]:
    grad, indices = pooled(x, op, size)
    return grad, x, indices


def _fractional_args(x: Tensor, op: Any) -> tuple[Any, ...]:
    dims = x.dim() - 2
    kernel, size = [2] * dims, [3] * dims
    grad, indices = pooled(x, op, kernel, size, torch.rand(2, 3, dims))
    return grad, x, kernel, size, indices


def _weight_args(weight: Tensor) -> tuple[Any, ...]:
    grad, x, _, *rest = conv_args(torch.randn(2, 3, 7, 9), [False, True, True])
    return grad, x, weight, *rest


@pytest.mark.parametrize("op", SHAPED, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_ops_on_a_shape(op: Any, channels_last: bool) -> None:
    """Equal to the bit though no value is given: also where the result fills the memory that lends the shape."""
    for reads, (shape, args_of) in zip(READERS[op], SHAPED[op], strict=True):
        x = torch.randn(shape)
        if channels_last and x.dim() in (4, 5) and op is not aten.nll_loss2d_backward.default:  # it takes no others
            x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        args = args_of(x)
        assert reads.side is None
        assert reads.when(args)
        want = op(*args)
        others = (*args[: reads.argument], *args[reads.argument + 1 :])
        fills = [False]
        if isinstance(want, Tensor) and like_of(want) == like_of(x) and out_form(op) is not None:
            fills.append(True)
        for fill in fills:
            form = functions.from_shape(op, reads.argument)
            given = (torch.empty(0), *like_of(x), fill, *others)
            assert likes(faked(form, given)) == likes(faked(op, args))  # where ATen's own are wrong, ours are
            got = form(*given)
            if isinstance(want, tuple):  # of a convolution: what was asked for
                assert all(same_bits(a, b) for a, b, asked in zip(want, got, args[10], strict=True) if asked)
            else:
                assert same_bits(want, got)


def test_every_reader_has_an_example() -> None:
    assert set(READERS) == set(SIDED) | set(SHAPED)


@settings(max_examples=150, deadline=None)
@given(
    dims=st.sampled_from([2, 3]),
    random=layouts,
    kernel=st.integers(1, 4),
    step=st.integers(1, 3),
    dilation=st.booleans(),
    ceil=st.booleans(),
)
def test_pool_indices_round_trip(dims: int, random: Any, kernel: int, step: int, dilation: bool, ceil: bool) -> None:
    apart = 2 if dilation else 1
    plane = tuple(random.randint((kernel - 1) * apart + 1, 11) for _ in range(dims))
    padding = random.randint(0, kernel // 2)
    x = SPECIAL[torch.tensor([random.randrange(18) for _ in range(6 * math.prod(plane))])].view(2, 3, *plane)
    op = aten.max_pool2d_with_indices if dims == 2 else aten.max_pool3d_with_indices
    _, found = op(x, [kernel] * dims, [step] * dims, [padding] * dims, [apart] * dims, ceil)
    found = laid_out(found, random)
    pooling = (plane, (kernel,) * dims, (step,) * dims, (padding,) * dims, (apart,) * dims)
    width = functions.pool_code_bits(pooling)
    assert width == next(b for b in (2, 4, 8) if kernel**dims <= 1 << b)
    packed = functions.pack_pool_indices(found, *pooling)
    assert packed.numel() == functions.pool_code_bytes(found.shape, found.stride(), pooling)
    assert packed.numel() <= found.numel() * width / 8 + found.numel() / 16 + 1
    assert same_bits(functions.unpack_pool_indices(packed, found.shape, found.stride(), *pooling), found)


def test_pool_windows_that_codes_cannot_tell() -> None:
    assert functions.pool_code_bits(((3, 3), (1, 17), (1, 1), (0, 8), (1, 1))) is not None
    assert functions.pool_code_bits(((3, 3), (2, 4), (1, 1), (1, 2), (1, 1))) is None  # two places, one offset
    assert functions.pool_code_bits(((99, 99), (17, 17), (1, 1), (0, 0), (1, 1))) is None  # 289 places


@pytest.mark.parametrize("plane", [1, 256, 257, 2**15, 2**15 + 1])
def test_narrow_integers(plane: int) -> None:
    from graphplan.codecs.narrow import _WIDTHS

    dtype = next(d for d in _WIDTHS if plane - 1 <= torch.iinfo(d).max)
    x = torch.tensor([0, plane // 2, plane - 1])
    assert torch.equal(functions.widen_integers(functions.narrow_integers(x, dtype), torch.int64), x)


def test_chunks_bound_the_temporaries() -> None:
    n = 16 * functions.CHUNK + 3
    x = torch.randn(n)
    mask = x > 0
    packed = functions.pack_sides(mask, *TRUE)
    above = (["above"], [0.0])
    threshold = functions.from_sides(aten.threshold_backward.default, 1)
    asked = (packed, 0, [-INF, NAN], torch.float32, (n,), (1,), torch.float32, (1,), x, 0)
    _, found = aten.max_pool2d_with_indices(x[: 1 << 22].view(16, 1, 512, 512), [3, 3], [2, 2], [1, 1])
    pooling = ((512, 512), (3, 3), (2, 2), (1, 1), (1, 1))
    codes = functions.pack_pool_indices(found, *pooling)
    for what, call, result_bytes in (
        ("bool", lambda: functions.pack_sides(mask, *TRUE), packed.numel()),
        ("above", lambda: functions.pack_sides(x, *above), packed.numel()),
        ("half", lambda: functions.pack_sides(x.bfloat16(), *above), packed.numel() + 2 * n),
        ("unpack", lambda: functions.unpack_bits(packed, (n,), (1,)), n),
        ("threshold", lambda: threshold(*asked), 4 * n),
        ("pool", lambda: functions.pack_pool_indices(found, *pooling), codes.numel()),
        (
            "unpool",
            lambda: functions.unpack_pool_indices(codes, found.shape, found.stride(), *pooling),
            8 * found.numel(),
        ),
    ):
        call()
        tracemalloc.start()  # numpy reports to it
        peak = peak_of(call, torch.device("cpu")).peak_bytes
        numpy_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        chunk_bytes = 8 * (4 * functions.POOL_BLOCK if "pool" in what else functions.CHUNK)  # int64
        assert peak <= result_bytes + chunk_bytes, what
        assert numpy_peak <= 8 * functions.CHUNK, what


def test_is_dense() -> None:
    x = torch.randn(4, 5, 6)
    assert functions.is_dense(x)
    assert functions.is_dense(x.permute(2, 0, 1))
    assert functions.is_dense(torch.empty(2, 3, 4, 4).to(memory_format=torch.channels_last))
    assert not functions.is_dense(x[1:])
    assert not functions.is_dense(x[:, :, ::2])
    assert not functions.is_dense(torch.zeros(1).expand(3))


def test_table() -> None:
    assert choose_codecs("none") == ()
    assert {c.name for c in choose_codecs("exact")} == {n for n, c in CODECS.items() if c.exact}
    assert [c.name for c in choose_codecs(("narrow", "bitmask"))] == ["narrow", "bitmask"]
    for name, codec in CODECS.items():
        assert codec.name == name
