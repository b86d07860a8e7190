"""Exact codecs: every round trip is bit-exact, sizes are exact, temporaries stay small; odd shapes and strides too."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphplan import functions
from graphplan.codecs import CODECS, choose_codecs
from graphplan.meter import peak_of

shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4)


def laid_out(x: Tensor, order: list[int]) -> Tensor:
    """Return x with the same values and strides permuted by `order` (dense, not contiguous)."""
    inverse = [order.index(i) for i in range(len(order))]
    return x.permute(order).contiguous().permute(inverse)


@settings(max_examples=150, deadline=None)
@given(shapes, st.randoms())
def test_bits_round_trip(shape: list[int], random: object) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)  # type: ignore[attr-defined]
    mask = laid_out(torch.rand(shape) > 0.5, order)
    packed = functions.pack_bits(mask)
    assert packed.numel() == functions.packed_bytes(mask.numel()) == (mask.numel() + 7) // 8
    back = functions.unpack_bits(packed, mask.shape, mask.stride())
    assert torch.equal(back, mask)
    assert back.stride() == mask.stride()


SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0])


@settings(max_examples=150, deadline=None)
@given(shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.randoms())
def test_threshold_backward_from_bits(shape: list[int], dtype: torch.dtype, random: object) -> None:
    """Equal to the bit to the op it stands for, NaN, infinities and signed zeros in both arguments included."""
    order = list(range(len(shape)))
    random.shuffle(order)  # type: ignore[attr-defined]
    n = torch.Size(shape).numel()
    x = laid_out(SPECIAL[torch.randint(0, 9, (n,))].view(shape).to(dtype), order)
    grad = laid_out(SPECIAL[torch.randint(0, 9, (n,))].view(shape).to(dtype), order)
    if random.random() < 0.3:  # type: ignore[attr-defined]
        grad = grad.contiguous()  # other strides than x
    packed = functions.pack_above(x, 0)
    got = functions.threshold_backward_packed(grad, packed, x.shape, x.stride())
    want = torch.ops.aten.threshold_backward.default(grad, x, 0)
    bits = {4: torch.int32, 2: torch.int16, 8: torch.int64}[got.element_size()]
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.contiguous().view(bits)[~nan.contiguous()], want.contiguous().view(bits)[~nan.contiguous()])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_from_its_mask(p: float, dtype: torch.dtype) -> None:
    x = torch.randn(33, 17, dtype=dtype)
    x[0] = SPECIAL[:1].to(dtype)
    out, mask = torch.ops.aten.native_dropout.default(x, p, True)
    again = functions.dropout_from_mask(x, mask, p)
    assert torch.equal(out.nan_to_num(7), again.nan_to_num(7))


def test_chunks_bound_the_temporaries() -> None:
    n = 16 * functions.CHUNK + 3
    x = torch.randn(n)
    mask = x > 0
    packed = functions.pack_bits(mask)
    device = torch.device("cpu")
    slack = 8 * functions.CHUNK
    assert peak_of(lambda: functions.pack_bits(mask), device).peak_bytes <= packed.numel() + slack
    assert peak_of(lambda: functions.pack_above(x, 0), device).peak_bytes <= packed.numel() + slack
    assert peak_of(lambda: functions.unpack_bits(packed, (n,), (1,)), device).peak_bytes <= n + slack
    reading = peak_of(lambda: functions.threshold_backward_packed(x, packed, (n,), (1,)), device)
    assert reading.peak_bytes <= 4 * n + slack
    assert torch.equal(functions.unpack_bits(packed, (n,), (1,)), mask)


@pytest.mark.parametrize("plane", [1, 256, 257, 2**15, 2**15 + 1])
def test_narrow_integers(plane: int) -> None:
    from graphplan.codecs.narrow import _WIDTHS

    dtype = next(d for d in _WIDTHS if plane - 1 <= torch.iinfo(d).max)
    x = torch.tensor([0, plane // 2, plane - 1])
    assert torch.equal(functions.widen_integers(functions.narrow_integers(x, dtype), torch.int64), x)


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
