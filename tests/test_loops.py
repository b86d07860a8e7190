"""Loops over elements give what plain torch and numpy do, to the bit; where they cannot serve, those run."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphplan import functions
from graphplan.functions import native, slope
from graphplan.meter import peak_of

aten = torch.ops.aten
VALUES = (math.nan, math.inf, -math.inf, 0.0, -0.0, 3.0, -3.0, 6.0, 1e-45, -1e-45)
SIDES = {
    "above": [0.0],
    "positive": [],
    "inside": [0.0, 6.0],
    "hard": [],
    "ge": [3.0],
    "gt": [0.1],
    "le": [0.1],
    "lt": [-3.0],
    "eq": [3.0],
    "ne": [6.0],
}
BACKWARDS: list[tuple[Any, str, tuple[Any, ...]]] = [
    (aten.threshold_backward.default, "above", (0.0,)),
    (aten.hardtanh_backward.default, "inside", (0.0, 6.0)),
    (aten.leaky_relu_backward.default, "positive", (0.1, False)),
    (aten.hardsigmoid_backward.default, "hard", ()),
]
sizes = st.integers(0, 40) | st.sampled_from((4095, 4096, 4097, 32767, 32768, 32769, 100_003))


def both(call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the result by loops, and without them."""
    found = call()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "serves", lambda *tensors: False)
        return found, call()


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype is torch.float32:
        return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def numbers(size: int, seed: int) -> Tensor:
    """Return normal numbers with some of VALUES between them."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=random) * 3
    chosen = torch.randint(len(VALUES), (size,), generator=random)
    return torch.where(torch.rand(size, generator=random) < 0.3, torch.tensor(VALUES)[chosen], x)


@settings(max_examples=40, deadline=None)
@given(size=sizes, seed=st.integers(0, 1 << 30), side=st.sampled_from(list(SIDES)))
def test_bits(size: int, seed: int, side: str) -> None:
    x, mask = numbers(size, seed), numbers(size, seed) > 0
    found, plain = both(lambda: functions.pack_sides(x, [side, "above"], [*SIDES[side], 0.5]))
    assert torch.equal(found, plain)
    packed, plain = both(lambda: functions.pack_sides(mask, ["true"], []))
    assert torch.equal(packed, plain)
    for back in both(lambda: functions.unpack_bits(packed, (size,), (1,))):
        assert torch.equal(back, mask)


@settings(max_examples=40, deadline=None)
@given(size=sizes, seed=st.integers(0, 1 << 30), case=st.sampled_from(BACKWARDS), over=st.sampled_from((None, 0)))
def test_backwards_from_bits(size: int, seed: int, case: tuple[Any, str, tuple[Any, ...]], over: int | None) -> None:
    op, side, consts = case
    x, grad = numbers(size, seed), numbers(size, seed + 1)
    of = list(consts) if side in ("above", "inside") else []
    given_ = (functions.pack_sides(x, [side], of), 0, list(functions.SIDES[side].values(*of)))
    like = (torch.float32, (size,), (1,), torch.float32, (1,))
    found, plain = both(lambda: functions.from_sides(op, 1, over)(*given_, *like, grad.clone(), *consts))
    assert same_bits(found, plain)


@settings(max_examples=40, deadline=None)
@given(size=sizes, seed=st.integers(0, 1 << 30), p=st.sampled_from((0.0, 0.1, 0.5, 1.0)))
def test_dropout(size: int, seed: int, p: float) -> None:
    x, mask = numbers(size, seed), numbers(size, seed + 1) > 0
    of, factor = functions.dropout_backward, 0.0 if p == 1 else 1 / (1 - p)
    packed = functions.pack_sides(mask, ["true"], [])
    like = (torch.bool, (size,), (1,), torch.float32, (1,))
    form = functions.from_sides(of, 1)
    for call in (
        lambda: functions.dropout_from_mask(x, mask, p),
        lambda: of(x, mask, factor),
        lambda: form(packed, 0, [0.0, 1.0], *like, x, factor),
    ):
        assert same_bits(*both(call))


@settings(max_examples=40, deadline=None)
@given(size=sizes, seed=st.integers(0, 1 << 30), bits=st.sampled_from((4, 2)), over=st.sampled_from((None, 0)))
def test_backwards_from_slopes(size: int, seed: int, bits: int, over: int | None) -> None:
    x, grad = numbers(size, seed), numbers(size, seed + 1)
    code, like = functions.quantise_slopes(x, "gelu", [], bits, 1, 1), ((size,), (1,), torch.float32, (1,))
    form = functions.from_slopes(aten.gelu_backward.default, 1, over)
    assert same_bits(*both(lambda: form(code, bits, *like, grad.clone())))


def test_strides() -> None:
    """What lies in another order than its mask, or has gaps, is left to torch."""
    mask = torch.rand(2, 3, 8, 6) < 0.5
    last = torch.randn(2, 3, 8, 6).to(memory_format=torch.channels_last)
    for x in (last, torch.randn(2, 3, 8, 12)[..., ::2], torch.randn(2, 3, 8, 1).expand(2, 3, 8, 6), last.double()):
        found, plain = both(lambda x=x: functions.dropout_backward(x, mask, 2.0))  # type: ignore[misc]
        assert torch.equal(found, plain)
        assert found.stride() == plain.stride()
    found, plain = both(lambda: functions.dropout_backward(last, mask.to(memory_format=torch.channels_last), 2.0))
    assert torch.equal(found, plain)


def test_nothing_is_held_beside_the_result() -> None:
    x, mask = torch.randn(1 << 20), torch.rand(1 << 20) < 0.5
    functions.dropout_backward(x, mask, 2.0)
    assert peak_of(lambda: functions.dropout_backward(x, mask, 2.0), x.device).peak_bytes == 4 << 20
    assert peak_of(lambda: functions.pack_sides(x, ["above"], [0.0]), x.device).peak_bytes == 1 << 17
    form = functions.from_slopes(aten.gelu_backward.default, 1, 0)
    args = functions.quantise_slopes(x, "gelu", [], 4, 1, 1), 4, x.shape, x.stride(), x.dtype, x.stride(), x
    form(*args)
    assert peak_of(lambda: form(*args), x.device).peak_bytes == 0


def test_threads_of_their_own() -> None:
    """Calls from several threads at once, and another number of torch's threads in between."""
    x = numbers(1 << 18, 0)
    expected = functions.pack_sides(x, ["above"], [0.0])
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(functions.pack_sides(x, ["above"], [0.0]), expected):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_torch_keeps_its_number_of_threads() -> None:
    """Numba starts its own threads once in a process, by a call that sets the number of torch's, too."""
    script = """
import torch
from graphplan.functions import start_loops
torch.set_num_threads(1)
torch.randn(1 << 18).exp()
start_loops()
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "1"


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graphplan.functions.loops", None)
    assert native.loops.__wrapped__() is None
    monkeypatch.undo()
    assert native.loops.__wrapped__() is not None
    monkeypatch.setenv("GRAPHPLAN_LOOPS", "0")
    assert native.loops.__wrapped__() is None


@pytest.mark.parametrize("function", slope.LOOPS)
def test_a_wrong_derivative_is_not_believed(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3000)

    def decoded() -> Tensor:
        code = functions.quantise_slopes(x, function, [], 4, 1, 1)
        return functions.dequantise(code, 4, x.shape, x.stride(), x.dtype)

    assert slope._agrees.__wrapped__(function)
    right = decoded()
    monkeypatch.setattr(native, "serves", lambda *tensors: False)
    assert ((decoded() - right).abs() > 1e-5).sum() <= 3  # a derivative is within 1e-6: at the edge of a code
    monkeypatch.setitem(slope.LOOPS, function, (slope.LOOPS[function] + 1) % 3)
    with pytest.warns(RuntimeWarning, match="from ATen"):
        assert not slope._agrees.__wrapped__(function)
