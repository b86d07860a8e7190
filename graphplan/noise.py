"""Noise: what lossy codes of each activation add to the gradient, as a share of the gradient's own variance.

For an activation l under a code, rho = sum over parameters p of w_p * E||g'_p - g_p||^2, with g the gradient, g' that
of a backward pass that reads the code of l, and w_p = 1 / variance of the batch gradient: of all parameters together
(SGD), or of each (Adam, which divides by it; the sum is then a mean over elements). Rounding errors of different
activations are independent, so their rho add up (reference: ActNN, Chen et al. 2021; GACT, Liu et al. 2022, warns
where the sum passes 0.1). One replay under a reference code is scaled to its kin by their mean square errors: int4 for
roundings of the activation itself, fewbit4 for those of a derivative at it. Where a reader's error does not grow so
(the backward of a normalisation multiplies its input by itself) the coarsest of the kin is replayed, too.

The estimates belong to the model and the data, not to the machine: they can be saved and shipped.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphplan.capture import Capture, capture, flatten_call
from graphplan.codecs import choose_codecs
from graphplan.errors import GraphplanError
from graphplan.instructions import Instruction, Instructions, Loss, instructions_of
from graphplan.replay import Batch, Tape, changed_gradients, gradient_nodes, reader_errors, real_parts
from graphplan.rewrite import Rewritten
from graphplan.runtime import like_traced
from graphplan.tree import arguments

FORMAT = "graphplan-noise-2"
PPB = 1_000_000_000
REFUSED_PPB = 2 * PPB  # above any limit
BIAS_LIMIT = 0.2  # of an error's square: rounding that leans one way does not average out over steps
KEYS = (1, 2)
MORE_KEYS = (3, 4, 5, 6)
ALIKE = 1.5  # two errors' squares, scaled to each other, that count as the same
Report = Callable[[str, int, int], None]


class NoiseFormatError(GraphplanError, ValueError):
    """A noise file that cannot be read: truncated, not JSON, or of an unknown version."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Estimates for one model and batch. `rho[activation][codec]`; `bias` alike, of the error at the codec's reference.

    `gradient_variance` is E||g - E g||^2 of the batch gradient; `weights` are "sgd" or "adam".
    """

    model: str
    weights: str
    gradient_variance: float
    rho: dict[str, dict[str, float]]
    bias: dict[str, dict[str, float]]

    def ppb(self, activation: str, codec: str) -> int:
        """Return rho in parts per billion, rounded up; above any limit where it is refused or unknown."""
        rho = self.rho.get(activation, {}).get(codec, math.inf)
        if not math.isfinite(rho) or rho >= 1 or self.bias.get(activation, {}).get(codec, 0.0) > BIAS_LIMIT:
            return REFUSED_PPB
        return math.ceil(rho * PPB)

    def times(self, factor: float) -> Noise:
        """Return the same estimates, all larger by a factor."""
        rho = {a: {c: factor * r for c, r in found.items()} for a, found in self.rho.items()}
        return Noise(self.model, self.weights, self.gradient_variance, rho, self.bias)

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader sees the old file or the whole new one."""
        target = Path(path)
        scratch = target.with_name(target.name + ".tmp")
        scratch.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        scratch.replace(target)

    @staticmethod
    def load(path: str | Path) -> Noise:
        """Read what `save` wrote.

        Raises:
            NoiseFormatError: not JSON (truncated?), another format, a missing or wrong field.
        """
        try:
            data = json.loads(Path(path).read_text())
            if data.pop("format") != FORMAT or data.keys() != {f.name for f in fields(Noise)}:
                raise NoiseFormatError(
                    f"{path}: expected format {FORMAT!r} with fields {[f.name for f in fields(Noise)]}"
                )
            rho, bias = (
                {str(a): {str(c): float(f) for c, f in found.items()} for a, found in data[table].items()}
                for table in ("rho", "bias")
            )
            return Noise(str(data["model"]), str(data["weights"]), float(data["gradient_variance"]), rho, bias)
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as e:
            if isinstance(e, NoiseFormatError):
                raise
            raise NoiseFormatError(f"{path}: not a noise file (truncated?): {type(e).__name__} {e}") from e


def estimate_noise(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    example_targets: Any = None,
    codecs: str | Iterable[str] = "lossy",
    weights: str = "sgd",
) -> Noise:
    """Return what every lossy code would add to the gradient of `model` on this batch, to save, ship and pass on.

    Args:
        model: the module, in the mode in which it is trained; left as it is.
        example_inputs: a training batch of at least two samples, as in `optimize`.
        example_kwargs: keyword arguments that go with them.
        loss_fn: of the outputs (and `example_targets`); without it random gradients arrive at the outputs.
        example_targets: second argument of `loss_fn`, if it takes one.
        codecs: which codes.
        weights: "sgd" (one variance for all parameters) or "adam" (each by its own).
    """
    args, kwargs = arguments(example_inputs, example_kwargs)
    captured = capture(model, args, kwargs)
    batch = Batch(model, flatten_call(args, kwargs)[1], loss_fn, example_targets)
    return estimate(captured, instructions_of(captured.graph, choose_codecs(codecs)), batch, weights)


def estimate(
    captured: Capture, instructions: Instructions, batch: Batch, weights: str = "sgd", report: Report | None = None
) -> Noise:
    """Return the noise of every lossy code that `instructions` offer, by replay of one batch.

    Holds every value of one forward and backward at once: estimate where there is memory, and ship the result.

    Raises:
        GraphplanError: `weights` is neither "sgd" nor "adam".
    """
    if weights not in ("sgd", "adam"):
        raise GraphplanError(f'noise weights {weights!r}; choose "sgd" or "adam"')
    variance = gradient_variance(captured, batch)
    total = sum(variance.values())
    scale = _weights_of(captured, variance, weights)
    tape = Tape(captured, batch, keep=True)
    slots = list(_slots(captured, instructions))
    rho: dict[str, dict[str, float]] = {}
    bias: dict[str, dict[str, float]] = {}
    for i, slot in enumerate(slots):
        rho[slot.activation], bias[slot.activation] = _replay(tape, slot, scale)
        if report:
            report("noise of each activation", i + 1, len(slots))
    return Noise(captured.graph.name, weights, total, rho, bias)


def gradient_variance(captured: Capture, batch: Batch) -> dict[str, float]:
    """Return, for each parameter, the variance of its batch gradient: the sum over its elements.

    Half of the batch, twice, gives the gradient of a batch half as large, of twice the variance; two such gradients
    differ by four times the variance sought. A batch of one sample has no halves: the gradient's own square stands in.
    """
    if batch.size < 2:
        tape = Tape(captured, batch, keep=False)
        return {name: _square(tape.gradient(name)) for name in tape.gradients}
    half = torch.arange(batch.size) % (batch.size // 2)
    first = Tape(captured, batch.of(half), keep=False)
    second = Tape(captured, batch.of(half + batch.size // 2), keep=False)
    return {n: _square(first.gradient(n) - second.gradient(n)) / 4 for n in first.gradients}


@dataclass(frozen=True, slots=True)
class JointNoise:
    """Of one plan, all its codes at once: the noise measured, and which part of it leans one way."""

    noise: float
    bias: float


def measure_noise(captured: Capture, rewritten: Rewritten, batch: Batch, weights: str = "sgd") -> JointNoise:
    """Return what a plan's codes together add to the gradient of `batch`: one exact backward, one encoded for each key.

    Parameters, buffers, gradients and random streams are left as they are.
    """
    return next(measure_each(captured, (rewritten,), batch, weights))


def measure_each(
    captured: Capture, programs: Iterable[Rewritten], batch: Batch, weights: str = "sgd"
) -> Iterator[JointNoise]:
    """Yield `measure_noise` of each program; the exact backward is run once for all."""
    scale = _weights_of(captured, gradient_variance(captured, batch), weights)
    exact = Tape(captured, batch, keep=False)
    for rewritten in programs:
        made = []
        for key in KEYS:
            noisy = _run_step(captured, rewritten, batch, key)
            made.append({n: noisy[n] - exact.gradient(n) for n in exact.gradients})
        yield JointNoise(statistics.mean(_inner(d, d, scale) for d in made), _lean(made, scale))


@dataclass(frozen=True, slots=True)
class _Way:
    """A code of an activation: its encode and the instructions that read values from it."""

    loss: Loss
    encode: Instruction
    readers: list[Instruction]


@dataclass(frozen=True, slots=True)
class _Slot:
    """An activation and its codes by their codecs."""

    activation: str
    storage: int
    ways: Mapping[str, _Way]

    def kin(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the codec whose noise is replayed, and all that are scaled to it: itself too."""
        found: dict[str, list[str]] = {}
        for name, way in self.ways.items():
            found.setdefault(way.loss.reference, []).append(name)
        for reference, names in found.items():
            yield reference if reference in names else names[0], names


def _slots(captured: Capture, instructions: Instructions) -> Iterator[_Slot]:
    ways: dict[int, dict[str, _Way]] = {}
    joint = instructions.joint()
    variants = [item for i, item in enumerate(instructions.items) if item.kind == "variant" and i not in joint]
    for e in instructions.encoded:
        if e.loss is not None:
            encode = next(i for i in instructions.items if i.kind == "encode" and e.id in i.writes)
            readers = [i for i in variants if e.id in i.reads]
            ways.setdefault(e.of, {})[e.codec] = _Way(e.loss, encode, readers)
    for s, found in ways.items():
        yield _Slot(captured.graph.storages[s].name, s, found)


def _replay(tape: Tape, slot: _Slot, scale: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return rho and the bias for each codec; none where the activation is not finite: it is to be kept."""
    node = next(n for n in tape.values if tape.graph.storages_of[n.name] == (slot.storage,))
    x = tape.values[node]
    rho: dict[str, float] = {}
    bias: dict[str, float] = {}
    for chosen, kin in slot.kin() if bool(torch.isfinite(x).all()) else ():
        errors = {name: slot.ways[name].loss.mean_square_error(x) for name in kin}
        replayed = {chosen: _replay_code(tape, slot.ways[chosen], scale)}
        coarsest = max(kin, key=errors.__getitem__)
        if not _grows_alike(tape, slot.ways[chosen], slot.ways[coarsest], errors[chosen], errors[coarsest]):
            replayed[coarsest] = _replay_code(tape, slot.ways[coarsest], scale)
        points = sorted((errors[name], *found) for name, found in replayed.items())
        for name, error in errors.items():
            rho[name], bias[name] = replayed.get(name) or _between(points, error)
    return rho, bias


def _grows_alike(tape: Tape, a: _Way, b: _Way, error_a: float, error_b: float) -> bool:
    """Return whether the noise of `b` is that of `a`, scaled by their errors.

    All that follows the readers is linear in what they return, so it is, if each of their errors is. Not so where a
    reader multiplies its input by itself, as the backward of a normalisation, or saturates.
    """
    if error_a == error_b or not error_a:
        return True
    before, after = (reader_errors(tape, way.encode, way.readers, KEYS[0]) for way in (a, b))
    grown = [(before.get(n, 0.0), after.get(n, 0.0) * error_a / error_b) for n in before.keys() | after.keys()]
    return all(max(x, y) <= ALIKE * min(x, y) for x, y in grown)


def _between(points: Sequence[tuple[float, float, float]], error: float) -> tuple[float, float]:
    """Return rho and the bias at `error` from one or two (error, rho, bias): rho / error is linear between the two.

    Below both it stays: a rho that grows faster than its error is then no less than it should be.
    """
    (low, rho, bias), (high, rho_high, bias_high) = points[0], points[-1]
    if low == 0:
        return (0.0 if error == 0 else math.inf), bias  # where the replayed code is exact
    if error <= low or low == high:
        return rho * error / low, bias
    share = (error - low) / (high - low)
    return error * ((1 - share) * rho / low + share * rho_high / high), max(bias, bias_high)


def _replay_code(tape: Tape, way: _Way, scale: Mapping[str, float]) -> tuple[float, float]:
    """Return the noise of one code and its bias."""

    def differences(key: int) -> dict[str, Tensor]:
        found = changed_gradients(tape, way.encode, way.readers, key)
        return {n: g - tape.gradient(n) for n, g in found.items()}

    made = [differences(key) for key in KEYS]
    if _lean(made, scale) > BIAS_LIMIT:  # two errors of few elements look alike by chance
        made.extend(differences(key) for key in MORE_KEYS)
    return statistics.mean(_inner(d, d, scale) for d in made), _lean(made, scale)


def _lean(differences: Sequence[Mapping[str, Tensor]], scale: Mapping[str, float]) -> float:
    """Return which part of the errors' mean square is the square of their mean, by what each two have in common."""
    square = statistics.mean(_inner(d, d, scale) for d in differences)
    common = statistics.mean(_inner(a, b, scale) for a, b in itertools.combinations(differences, 2))
    return max(0.0, common / square) if square > 0 else 0.0


def _inner(a: Mapping[str, Tensor], b: Mapping[str, Tensor], scale: Mapping[str, float]) -> float:
    return sum(scale[n] * float(torch.sum(a[n].double() * b[n].double())) for n in a.keys() & b.keys())


def _weights_of(captured: Capture, variance: Mapping[str, float], weights: str) -> dict[str, float]:
    if weights == "sgd":
        total = sum(variance.values())
        return dict.fromkeys(variance, 1 / total if total > 0 else math.inf)
    nodes, graph = captured.graph.nodes, captured.graph
    numel = {p.path: nodes[p.node].meta["val"].numel() for p in graph.primals if p.path in variance}
    everything = sum(numel.values())
    return {n: numel[n] / everything / v if v > 0 else 0.0 for n, v in variance.items()}


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _run_step(captured: Capture, rewritten: Rewritten, batch: Batch, key: int) -> dict[str, Tensor]:
    graph = captured.graph
    primals, nodes = batch.primals(graph), graph.nodes
    devices = {t.device for t in primals if t.is_cuda}
    with torch.random.fork_rng(devices=devices), torch.no_grad(), torch._C._DisableAutocast():
        results = rewritten.forward([*primals, *((key,) if rewritten.keyed else ())])
        outputs, saved = results[: rewritten.outputs], list(results[rewritten.outputs :])
        del results
        tangents = iter(batch.tangents(captured, outputs, primals))
        strides = [tuple(nodes[t].meta["val"].stride()) for t in graph.tangents if t is not None]
        saved.extend(like_traced(t, s) for t, s in zip(tangents, strides, strict=True))
        found: Sequence[Any] = rewritten.backward(saved)
    wanted = gradient_nodes(graph)
    grads = zip(graph.primals, found, strict=True)
    return {p.path: real_parts(g) for p, g in grads if g is not None and p.path in wanted}
