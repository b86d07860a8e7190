"""measure: the peak and the time of one training step, by the same meter for every method compared."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphplan.capture import Capture
from graphplan.errors import GraphplanError
from graphplan.graph import Output
from graphplan.meter import Meter, Reading, peak_of
from graphplan.release import unheld
from graphplan.runtime import is_like_traced, output_of
from graphplan.tree import Template, arguments
from graphplan.whole import WholeStep


@dataclass(frozen=True, slots=True)
class Measurement:
    """One training step, warm. `peak_bytes` = `resident_bytes` + what the step allocates at its worst moment.

    Resident are the module's parameters and buffers and the example inputs and targets, each storage once.
    `rss_peak_bytes` is the process's high-water mark so far: shown beside, never instead (None where unknown).
    `timeline` is (ns, bytes in use) over the measured step; empty on CUDA.
    """

    peak_bytes: int
    resident_bytes: int
    step_ns: int
    step_ns_runs: tuple[int, ...]
    rss_peak_bytes: int | None
    timeline: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        """Return the figures on one line."""
        from graphplan.units import format_bytes, format_ns

        return f"peak {format_bytes(self.peak_bytes)} ({self.peak_bytes} bytes), step {format_ns(self.step_ns)}"


def measure(
    module: nn.Module | WholeStep,
    example_inputs: Any = (),
    loss_fn: Callable[..., Tensor] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    example_targets: Any = None,
    runs: int = 5,
) -> Measurement:
    """Measure training steps of any module: two to warm up (planning included), one metered, `runs` timed.

    A step is forward, `loss_fn(outputs)` (or `loss_fn(outputs, example_targets)`; without `loss_fn`, the sum of
    all floating outputs), backward; gradients are None when it begins and the caller holds outputs and loss to
    its end. Gradients, buffers and the RNG stream are put back afterwards.

    A step of `train_step` is measured whole, its update included; the optimizer's state is resident. Parameters and
    state are put back too.
    """
    if isinstance(module, WholeStep):
        return _measure_whole(module, example_inputs, example_targets, runs)
    example_inputs, kwargs = arguments(example_inputs, example_kwargs)
    loss_of = with_targets(loss_fn or default_loss, example_targets)

    def step() -> Any:
        outputs = module(*example_inputs, **kwargs)
        loss = loss_of(outputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return outputs, loss

    device = _device_of(module, (example_inputs, kwargs))
    with preserved(module, (example_inputs, kwargs), device):
        reading = _warm_reading(module, step, device)
        times = [_timed(module, step, device) for _ in range(runs)]
    return _measurement(resident_bytes(module, example_inputs, kwargs, example_targets), reading, times)


def _measure_whole(whole: WholeStep, inputs: Any, targets: Any, runs: int) -> Measurement:
    device = _device_of(whole.model, (inputs, targets))

    def step() -> Any:
        return whole(inputs, targets)

    with trained_back(whole.model, whole.optimizer, (inputs, targets), device):
        reading = _warm_reading(whole.model, step, device)
        times = [_timed(whole.model, step, device) for _ in range(runs)]
        resident = resident_bytes(whole.model, inputs, targets, whole.state_tensors())
    return _measurement(resident, reading, times)


def _measurement(resident: int, reading: Reading, times: list[int]) -> Measurement:
    timeline = tuple((t, resident + level) for t, level in reading.timeline)
    return Measurement(
        resident + reading.peak_bytes,
        resident,
        int(statistics.median(times)),
        tuple(times),
        _rss_peak(),
        timeline,
    )


def resident_bytes(module: nn.Module, *structures: Any) -> int:
    """Return the bytes of the module's parameters and buffers and of all tensors in `structures`, counted once."""
    return tensors_bytes([*module.parameters(), *module.buffers()], *structures)


def tensors_bytes(*structures: Any) -> int:
    """Return the bytes of all tensors in `structures`, each storage counted once."""
    storages = (t.untyped_storage() for s in structures for t in Template.of(s)[1])
    return sum({s._cdata: s.nbytes() for s in storages}.values())


class LossFails(GraphplanError):
    """The caller's loss cannot be run on outputs of the captured shapes."""


@dataclass(frozen=True, slots=True)
class LossMemory:
    """What the caller's loss holds beside the model's outputs: at most, and still while the model's backward runs.

    `released` are the forward outputs whose gradients only autograd holds by then.
    """

    peak_bytes: int
    held_bytes: int
    released: frozenset[int] = frozenset()


# Without a loss function to measure: the loss itself, its gradient, and a few scalars between them.
SCALARS_BYTES = 64
_MARKER_BYTES = 4099


def loss_memory(captured: Capture, loss_fn: Callable[..., Tensor], targets: Any) -> LossMemory:
    """Run `loss_fn` forward and backward on made-up outputs and return its LossMemory.

    `peak_bytes` includes the gradients that it hands back, `held_bytes` does not.

    Raises:
        LossFails: the loss fails on outputs of the captured shapes; its own error is the cause.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        (made, views), alone, copied = _made_outputs(captured), list[bool](), list[int]()
        nodes, tangents = captured.graph.nodes, captured.graph.tangents
        strides = [None if t is None else nodes[t].meta["val"].stride() for t in tangents]
        device = made[0].device if made else torch.device("cpu")

        def run() -> Any:
            fresh = _Marked.apply(alone, copied, strides, *made)  # type: ignore[no-untyped-call]
            outputs = captured.outputs.fill([output_of(o, fresh, ()) for o in views])
            del fresh
            loss = with_targets(loss_fn, targets)(outputs)
            loss.backward()  # type: ignore[no-untyped-call]
            return outputs, loss

        try:
            run()
            reading = peak_of(run, device)
        except Exception as e:
            raise LossFails(
                f"loss_fn fails on outputs of the captured shapes ({type(e).__name__}: {e}); it is called as "
                f"loss_fn(outputs{', example_targets' if targets is not None else ''}) and must return a scalar"
            ) from e
    handed_back = sum(t.numel() * t.element_size() for t in made if t.requires_grad)
    released = frozenset(i for i, free in enumerate(alone[: len(captured.graph.forward_outputs)]) if free)
    found = _read_loss(reading, handed_back, sum(copied))
    return replace(found, released=released)


class _Marked(torch.autograd.Function):
    """Stands where the model's backward will: sees who holds the loss's gradients, and allocates a marker."""

    @staticmethod
    def forward(ctx: Any, alone: list[bool], copied: list[int], strides: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.alone, ctx.copied, ctx.strides = alone, copied, strides
        ctx.shapes = [(t.shape, t.dtype, t.device) if t.requires_grad else None for t in tensors]
        outputs = tuple(t.view_as(t) for t in tensors)
        ctx.mark_non_differentiable(*(o for o, t in zip(outputs, tensors, strict=True) if not t.requires_grad))
        ctx.set_materialize_grads(False)  # else autograd makes zeros also for outputs that have no gradient
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        alone = unheld(gradients)
        # What has no gradient is held by nobody; where it is trained, the step makes zeros.
        ctx.alone[:] = [own or g is None for own, g in zip(alone, gradients, strict=True)]
        # The step copies these into the order that it was traced for, and autograd holds them besides.
        ctx.copied[:] = [
            g.numel() * g.element_size()
            for g, s, own in zip(gradients, ctx.strides, alone, strict=False)  # returned inputs come behind
            if g is not None and s is not None and not own and not is_like_traced(g, s)
        ]
        unread = [s for s, g in zip(ctx.shapes, gradients, strict=True) if g is None and s is not None]
        zeros = [torch.zeros(size, dtype=dtype, device=device) for size, dtype, device in unread]
        torch.empty(_MARKER_BYTES, dtype=torch.uint8)
        del zeros
        return (None,) * (3 + len(gradients))


def _read_loss(reading: Reading, handed_back: int, copied: int) -> LossMemory:
    """Return what the loss needs; of what it hands back, the step copies gradients of `copied` bytes."""
    level = peak = 0
    for _, after in reading.timeline:
        if after - level == _MARKER_BYTES:
            return LossMemory(max(peak, handed_back), max(0, level - (handed_back - copied)))
        level, peak = after, max(peak, after)
    return LossMemory(reading.peak_bytes, SCALARS_BYTES)


def _made_outputs(captured: Capture) -> tuple[list[Tensor], list[Output]]:
    """Return made-up results of the forward half (and inputs that are returned), and how outputs are made of them.

    As in the step: the gradients of views of one result are made into one of that result.
    """
    graph, nodes = captured.graph, captured.graph.nodes
    wanted = dict(zip(graph.forward_outputs, (t is not None for t in graph.tangents), strict=True))
    place = {name: i for i, name in enumerate(wanted)}
    views = []
    for o in graph.outputs:
        name = graph.forward_outputs[o.index] if o.source == "forward" else graph.primals[o.index].node
        place.setdefault(name, len(place))
        if o.source == "primal":
            wanted[name] = wanted.get(name, False) or not o.detached
        views.append(replace(o, source="forward", index=place[name]))
    return [_made(nodes[name].meta["val"]).requires_grad_(trained) for name, trained in wanted.items()], views


def _made(like: Tensor) -> Tensor:
    """Return a tensor like `like`, filled through its storage: one that is expanded refuses to be written."""
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    whole = made.as_strided((made.untyped_storage().nbytes() // made.element_size(),), (1,))
    whole = torch.view_as_real(whole) if whole.is_complex() else whole
    whole.uniform_(0.1, 0.9) if whole.is_floating_point() else whole.zero_()
    return made


def with_targets(loss_fn: Callable[..., Tensor], targets: Any) -> Callable[[Any], Tensor]:
    """Return `loss_fn` as a function of the outputs alone."""
    return loss_fn if targets is None else (lambda outputs: loss_fn(outputs, targets))


def default_loss(outputs: Any) -> Tensor:
    """Return the sum of all floating outputs that require grad."""
    parts = [t.sum() for t in Template.of(outputs)[1] if t.requires_grad]
    if not parts:
        raise GraphplanError("no output requires grad: pass loss_fn, or train something")
    return torch.stack([p.double() for p in parts]).sum() if len(parts) > 1 else parts[0]


@contextlib.contextmanager
def preserved(module: nn.Module, structures: Any, device: torch.device) -> Iterator[None]:
    """Put gradients, buffers, inputs changed in place and RNG streams back on leaving."""
    tensors = [*module.parameters(), *Template.of(structures)[1]]
    gradients = [(t, t.grad) for t in tensors if t.is_leaf]
    # BatchNorm's kernel changes its buffers without counting a version, so all buffers are written back.
    values = [(b, -1, b.detach().clone()) for b in module.buffers()]
    values.extend((t, t._version, t.detach().clone()) for t in Template.of(structures)[1])
    for t, _ in gradients:
        t.grad = None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for t, g in gradients:
                t.grad = g
            with torch.no_grad():
                for t, version, old in values:
                    if t._version != version:
                        t.copy_(old)


@contextlib.contextmanager
def trained_back(module: nn.Module, optimizer: Optimizer, structures: Any, device: torch.device) -> Iterator[None]:
    """Put parameters and the optimizer's state back on leaving, and what `preserved` does."""
    state = {p: dict(own) for p, own in optimizer.state.items()}
    tensors = [*module.parameters(), *(v for own in state.values() for v in own.values() if isinstance(v, Tensor))]
    values = [(t, t.detach().clone()) for t in tensors]
    with preserved(module, structures, device):
        try:
            yield
        finally:
            with torch.no_grad():
                for t, old in values:
                    t.copy_(old)
            optimizer.state.clear()
            optimizer.state.update(state)


def _warm_reading(module: nn.Module, step: Callable[[], Any], device: torch.device) -> Reading:
    for _ in range(2):
        held = step()
        _drop_gradients(module)
        del held
    gc.collect()
    with Meter(device) as meter:
        with meter.region():
            held = step()
        del held
    _drop_gradients(module)
    return meter.readings[0]


def _timed(module: nn.Module, step: Callable[[], Any], device: torch.device) -> int:
    sync: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    sync()
    start = time.perf_counter_ns()
    held = step()
    sync()
    elapsed = time.perf_counter_ns() - start
    del held
    _drop_gradients(module)
    return elapsed


def _drop_gradients(module: nn.Module) -> None:
    for p in module.parameters():
        p.grad = None


def _device_of(module: nn.Module, structures: Any) -> torch.device:
    tensors: Iterable[Tensor] = (*module.parameters(), *Template.of(structures)[1])
    return next((t.device for t in tensors), torch.device("cpu"))


def _rss_peak() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
