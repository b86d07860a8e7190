"""What the codecs' functions cost, as a ratio to torch.clone of a 64 MB float32 tensor. `python -m bench.codecs`.

Each is timed in turn with a clone right before it, in one process, on a warm heap (the process starts itself again,
with glibc's malloc told to reuse what is freed). A ratio is of such a pair; printed are the median and the quartiles.
One JSON line each is added to bench/results/codecs.jsonl. Rows with a target are held to it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from bench.page import write_between
from bench.processes import RESULTS

WARM = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
OUT = RESULTS / "codecs.jsonl"
NUMEL = 1 << 24  # 64 MiB of float32
Cases = dict[str, tuple[Callable[[], object], float | None]]  # what runs, and the ratio it is to reach
PACK, UNPACK = {8: 1.3, 4: 1.6, 2: 1.5}, 0.9  # by bits, with a compiler
PACK_EAGER, UNPACK_EAGER = {8: 0.9, 4: 0.9, 2: 0.9}, 0.9


@dataclass(frozen=True, slots=True)
class Row:
    """Ratios to clone: median and quartiles of `runs` pairs."""

    name: str
    ratio: float
    low: float
    high: float
    target: float | None
    clone_ms: float
    runs: int
    threads: int
    torch: str

    def __str__(self) -> str:
        """Return one line of the table."""
        held = (
            ""
            if self.target is None
            else f"  target {self.target}: {'held' if self.ratio <= self.target else 'MISSED'}"
        )
        return f"{self.name:44} {self.ratio:6.2f}  [{self.low:.2f}, {self.high:.2f}]{held}"


def sides() -> Cases:
    """Return packing, unpacking, and backward ops run from bits beside the ops themselves."""
    import torch

    from graphplan.functions import SIDES, dropout_backward, from_sides, pack_sides, unpack_bits

    aten = torch.ops.aten
    x, grad = torch.randn(NUMEL), torch.randn(NUMEL)
    mask, half = x > 0, x.bfloat16()
    like, out = (torch.float32, (NUMEL,), (1,)), (torch.float32, (1,))
    bits = pack_sides(mask, ["true"], [])
    cases: Cases = {
        "copy_ into a tensor that is there": (lambda: grad.copy_(x), None),
        "bool -> bits": (lambda: pack_sides(mask, ["true"], []), 0.5),
        "bits -> bool": (lambda: unpack_bits(bits, (NUMEL,), (1,)), 0.5),
        "bfloat16 -> bits (above 0)": (lambda: pack_sides(half, ["above"], [0.0]), None),
    }
    for op, side, consts in (
        (aten.threshold_backward.default, "above", (0.0,)),
        (aten.hardtanh_backward.default, "inside", (0.0, 6.0)),
        (aten.leaky_relu_backward.default, "positive", (0.1, False)),
        (aten.hardsigmoid_backward.default, "hard", ()),
    ):
        of = list(consts) if side in ("above", "inside") else []
        name, packed, values = op.overloadpacket.__name__, pack_sides(x, [side], of), list(SIDES[side].values(*of))
        plain, over, args = from_sides(op, 1), from_sides(op, 1, 0), (packed, 0, values, *like, *out, grad, *consts)
        cases[f"float32 -> bits ({side})"] = (partial(pack_sides, x, [side], of), None)
        cases[f"{name} itself"] = (partial(op, grad, x, *consts), None)
        cases[f"{name} from bits"] = (partial(plain, *args), None)
        cases[f"{name} from bits, over grad"] = (partial(over, *args), None)
    form, args = from_sides(dropout_backward, 1), (bits, 0, [0.0, 1.0], torch.bool, (NUMEL,), (1,), *out, grad, 1.25)
    cases["dropout_backward itself"] = (lambda: dropout_backward(grad, mask, 1.25), None)
    cases["dropout_backward from bits"] = (lambda: form(*args), None)
    return cases


def compiled() -> Cases:
    """Return what Inductor makes of masks, in the layout that suits it: why they are left to numpy (DECISIONS 16)."""
    import torch
    from torch import Tensor

    x, grad, mask = torch.randn(NUMEL), torch.randn(NUMEL), torch.randn(NUMEL) > 0
    block = 4096  # bit i of byte j is element i * block + j: whole vectors are read and written
    shifts = torch.arange(8, dtype=torch.int32).view(1, 8, 1)

    def pack(bits: Tensor) -> Tensor:
        parts = bits.view(-1, 8, block).to(torch.int32)
        packed = parts[:, 0]
        for i in range(1, 8):
            packed = packed | (parts[:, i] << i)
        return packed.to(torch.uint8)

    def unpack(packed: Tensor) -> Tensor:
        return (((packed.to(torch.int32).unsqueeze(1) >> shifts) & 1) != 0).view(-1)

    pack_float = torch.compile(lambda x: pack(~(x <= 0.0)))
    unpack_bool, backward = torch.compile(unpack), torch.compile(lambda p, g: torch.where(unpack(p), g, 0.0))
    packed = pack_float(x).view(-1, block)
    assert torch.equal(unpack_bool(packed), x > 0)
    pack_bool = torch.compile(pack)
    return {
        "Inductor: float32 -> bits (above)": (lambda: pack_float(x), None),
        "Inductor: bool -> bits": (lambda: pack_bool(mask), None),
        "Inductor: bits -> bool": (lambda: unpack_bool(packed), None),
        "Inductor: threshold_backward from bits": (lambda: backward(packed, grad), None),
    }


def groups() -> Cases:
    """Return lossy codes both ways: as they run where a compiler stands, or as they are without one."""
    import torch

    from graphplan.functions import (
        HALF,
        dequantise,
        dequantise_channels,
        from_slopes,
        quantise,
        quantise_channels,
        quantise_slopes,
        warm_up,
    )
    from graphplan.functions.compiled import has_compiler

    fast = has_compiler(torch.device("cpu"))
    pack_targets, words = (PACK, "compiled") if fast else (PACK_EAGER, "no compiler")
    unpack_target = UNPACK if fast else UNPACK_EAGER
    x, cases = torch.randn(NUMEL), Cases()
    for bits in (8, 4, 2, HALF):
        name = "bfloat16" if bits == HALF else f"{bits} bit"
        if fast:
            warm_up(x.numel(), bits, x.dtype, x.device)
        code = quantise(x, bits, 1, 1)
        cases[f"pack {name}, {words}"] = (partial(quantise, x, bits, 1, 1), pack_targets.get(bits))
        target = unpack_target if bits in pack_targets else None
        cases[f"unpack {name}, {words}"] = (partial(dequantise, code, bits, x.shape, x.stride(), x.dtype), target)
    op, like = torch.ops.aten.gelu_backward.default, (x.shape, x.stride(), x.dtype)
    grad, form = torch.randn(NUMEL), from_slopes(op, 1)
    cases["gelu_backward itself"] = (partial(op, grad, x), None)
    for bits in (4, 2):
        code = quantise_slopes(x, "gelu", [], bits, 1, 1)
        cases[f"pack derivatives {bits} bit, {words}"] = (partial(quantise_slopes, x, "gelu", [], bits, 1, 1), None)
        cases[f"gelu_backward from {bits} bit, {words}"] = (partial(form, code, bits, *like, x.stride(), grad), None)
    planes, image = (16, 64, 1 << 14), x.view(16, 64, 128, 128)
    code = quantise_channels(image, planes, 3, 1, 1)
    cases[f"pack 3 bit by channel, {words}"] = (partial(quantise_channels, image, planes, 3, 1, 1), None)
    geometry = (planes, image.shape, image.stride(), image.dtype)
    cases[f"unpack 3 bit by channel, {words}"] = (partial(dequantise_channels, code, *geometry), None)
    return cases


def in_tree() -> Cases:
    """Return torch's own fused row-wise ops, which round to the nearest: why they are left alone (DECISIONS)."""
    import torch

    x, cases = torch.randn(NUMEL).view(-1, 256), Cases()
    for name in ("byte", "4bit", "2bit"):
        pack = getattr(torch.ops.quantized, f"embedding_bag_{name}_prepack")
        unpack, code = getattr(torch.ops.quantized, f"embedding_bag_{name}_unpack"), pack(x)
        cases[f"embedding_bag_{name}_prepack"] = (partial(pack, x), None)
        cases[f"embedding_bag_{name}_unpack"] = (partial(unpack, code), None)
    return cases


def indices() -> Cases:
    """Return pool indices to and from places in the window, of a pool with a 64 MB input."""
    import torch

    from graphplan.functions import narrow_integers, pack_pool_indices, unpack_pool_indices, widen_integers

    x = torch.randn(16, 64, 128, 128)
    cases: Cases = {}
    for kernel, padding in ((2, 0), (3, 1)):
        _, found = torch.ops.aten.max_pool2d_with_indices(x, [kernel] * 2, [2, 2], [padding] * 2)
        pooling = ((128, 128), (kernel,) * 2, (2, 2), (padding,) * 2, (1, 1))
        packed, size, stride = pack_pool_indices(found, *pooling), tuple(found.shape), found.stride()
        name = f"{kernel}x{kernel} pool indices"
        cases[f"{name} -> bits"] = (partial(pack_pool_indices, found, *pooling), None)
        cases[f"{name} <- bits"] = (partial(unpack_pool_indices, packed, size, stride, *pooling), None)
    small = narrow_integers(found, torch.int16)
    cases["int64 -> int16"] = (lambda: narrow_integers(found, torch.int16), None)
    cases["int64 <- int16"] = (lambda: widen_integers(small, torch.int64), None)
    return cases


def measure(cases: Cases, runs: int) -> list[Row]:
    """Time every case `runs` times, all in turn, each after a clone."""
    import torch

    source = torch.randn(NUMEL)
    ratios: dict[str, list[float]] = {name: [] for name in cases}
    clones: list[float] = []
    for run in range(runs + 2):
        for name, (call, _) in cases.items():
            start = time.perf_counter()
            source.clone()
            middle = time.perf_counter()
            call()
            end = time.perf_counter()
            if run >= 2:  # the first rounds fill the heap
                clones.append(middle - start)
                ratios[name].append((end - middle) / (middle - start))
    rows = []
    for name, (_, target) in cases.items():
        low, median, high = statistics.quantiles(ratios[name], n=4)
        clone_ms = statistics.median(clones) * 1e3
        rows.append(Row(name, median, low, high, target, clone_ms, runs, torch.get_num_threads(), torch.__version__))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--no-compiler", action="store_true", help="as on a machine that has none")
    parser.add_argument("--write", type=Path, help="Markdown file whose figures are replaced")
    args = parser.parse_args()
    if any(os.environ.get(k) != v for k, v in WARM.items()):
        # Threads wait as torch's do by default: to be woken for each small op takes longer than the op.
        warm = {k: v for k, v in {**os.environ, **WARM}.items() if k != "OMP_WAIT_POLICY"}
        os.execve(sys.executable, [sys.executable, "-m", "bench.codecs", *sys.argv[1:]], warm)
    if args.no_compiler:
        os.environ["CXX"] = "/nonexistent"  # before torch reads it
    suites = (groups, sides, indices, in_tree) if args.no_compiler else (groups, sides, indices, compiled)
    rows = [row for cases in suites for row in measure(cases(), args.runs)]
    head = f"clone of 64 MiB: {rows[0].clone_ms:.1f} ms, {rows[0].threads} threads, torch {rows[0].torch}"
    text = "\n".join([head, *map(str, rows)])
    print(text)
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as out:
        out.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
    if args.write and args.no_compiler:
        own = "\n".join([head, *(str(row) for row in rows if "no compiler" in row.name)])
        write_between(args.write, "codec speed without a compiler", f"```text\n{own}\n```")
    elif args.write:
        write_between(args.write, "codec speed", f"```text\n{text}\n```")


if __name__ == "__main__":
    main()
