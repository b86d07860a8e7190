"""capture: model + example inputs -> Capture (the joint forward + backward Graph and how to call it).

A short ladder: AOTAutograd's joint export takes most models as they are; `torch.export` in front of it takes those
that ask a tensor for a Python value or keep tensors as plain attributes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphplan.build import build_graph
from graphplan.errors import CaptureError, GraphplanError, UnsupportedModel
from graphplan.graph import Graph
from graphplan.passes import Extend, recurrent_layers_that_train
from graphplan.places import layer_of, user_line
from graphplan.tree import Template, path_to
from graphplan.watch import TraceAgain, Watch


@dataclass(frozen=True, slots=True)
class Capture:
    """A Graph and the structures around it: what goes in and what comes out of one call of the model.

    `roomy`: another form of the same step computes the same bits in less memory, and slower. `bare`: of a whole step,
    the same up to its gradients, where the noise of lossy codes is measured.
    """

    graph: Graph
    inputs: Template
    outputs: Template
    roomy: bool = False
    bare: Capture | None = None


def flatten_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Template, list[Tensor]]:
    """Return the structure of one call and its distinct input tensors; keyword order does not matter."""
    return Template.of((tuple(args), dict(sorted(kwargs.items()))))


def call_key(template: Template, tensors: Sequence[Tensor]) -> Hashable:
    """Return what two calls must share to be served by one captured graph."""
    return (template.key(), tuple((t.shape, _layout(t), t.dtype, t.device, t.requires_grad) for t in tensors))


def _layout(t: Tensor) -> Hashable:
    return t.stride() if t.layout is torch.strided else t.layout


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    inner: nn.Module | None = None,
    extend: Extend | None = None,
) -> Capture:
    """Trace one training step of `model` on `args` and `kwargs` in its present mode; nothing is executed.

    With `inner`, `model` is a wrapper that holds it as its attribute `model`, and the graph is named after it.
    `extend` adds to the graph (`normalise`).

    Raises:
        UnsupportedModel: nothing is trainable, or a parameter is sparse or not yet initialised.
        CaptureError: the model cannot be traced as one graph, or does not take these inputs.
    """
    check_model(model)
    template, tensors = flatten_call(args, kwargs or {})
    _check_call(model, tensors)
    if not any(t.requires_grad for t in (*model.parameters(), *tensors)):
        raise UnsupportedModel(
            f"{type(model).__name__} has no trainable parameter (requires_grad) and no input that requires grad: "
            "there is nothing to train"
        )
    flat = _Flat(model, template, "" if inner is None else "model.")
    # Tracing must not draw from the user's RNG stream.
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _restored(model), recurrent_layers_that_train():
        traced, joint = _climb(flat, tensors)
    owner, prefix = (model, "model.") if inner is None else (inner, "model.model.")
    graph = build_graph(joint, owner, traced, type(owner).__name__, prefix, extend)
    graph.verify()
    assert flat.record.returned is not None
    return Capture(graph, template, flat.record.returned)


class _Record:
    """Where a traced call leaves the structure of what it returned (torch.export puts module attributes back)."""

    def __init__(self) -> None:
        self.returned: Template | None = None
        self.rebound: set[str] = set()  # the buffers that the forward gives other tensors


class _Flat(nn.Module):
    """The model as a function of tensors to tensors."""

    def __init__(self, model: nn.Module, template: Template, prefix: str) -> None:
        super().__init__()
        self.model = model
        self.prefix = prefix
        self.template = template
        self.record = _Record()
        self.training = model.training

    @property
    def planned(self) -> nn.Module:
        """The model without the loss around it."""
        return self.model.get_submodule(self.prefix.removesuffix("."))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.template.fill(tensors)
        watch = Watch(self.model, self.record.rebound, self.prefix)
        outputs = watch.call(tensors, *args, **kwargs)
        number = path_to(outputs, (torch.SymInt, torch.SymFloat, torch.SymBool))
        if number is not None:
            raise CaptureError(
                f"the model returns a number that depends on a tensor's values (outputs{number}): return the tensor, "
                "and call .item() on it outside the model"
            )
        self.record.returned, leaves = Template.of(outputs)
        return tuple(leaves)


def _climb(flat: _Flat, tensors: list[Tensor]) -> tuple[nn.Module, Any]:
    """Return (the module that was traced, its joint graph) from the first rung that holds."""
    try:
        with _unlogged(), _restored(flat.model):
            return flat, _joint(flat, tensors)
    except TraceAgain:
        return _climb(flat, tensors)
    except GraphplanError:
        raise
    except Exception as first:  # noqa: BLE001  (tracing runs the user's code: any error may come out)
        try:
            with _unlogged(), _unprinted(), _own_backwards_refused(first):
                exported = torch.export.export(flat, tuple(tensors), strict=False).module(check_guards=False)
            _register_plain_tensors(exported)
            return exported, _joint(exported, tensors)
        except TraceAgain:
            return _climb(flat, tensors)
        except GraphplanError:
            raise
        except Exception as second:
            raise _explain(flat.planned, first, second) from second


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back the model's tensors and attributes: a trace leaves its own, in shared modules and by `self.x = ...`."""
    held = [
        (own, dict(own)) for module in model.modules() for own in (module._parameters, module._buffers, module.__dict__)
    ]
    try:
        yield
    finally:
        for own, before in held:
            own.clear()
            own.update(before)


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch from logging why a rung failed: the next may hold, else the error that we raise says what matters."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _unprinted() -> Iterator[None]:
    """Keep torch.export from printing the whole graph when it fails."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


@contextlib.contextmanager
def _own_backwards_refused(first: Exception) -> Iterator[None]:
    """Refuse a torch.autograd.Function: torch.export keeps its forward and forgets its backward.

    `first` is why the model was not captured without torch.export.

    But those that torch.library makes: a custom op stays one op, and its registered backward with it.

    Raises:
        UnsupportedModel: one is called.
    """
    own, here = torch.autograd.Function.__dict__["apply"], threading.get_ident()

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != here or cls.__module__ == _CUSTOM_OPS:  # another thread's training goes on
            return own.__get__(None, cls)(*args, **kwargs)
        raise UnsupportedModel(
            f"the model calls {cls.__name__}, a torch.autograd.Function, whose backward torch.export would lose: "
            f"{_without_export(cls, first)}\n  without torch.export: {_headline(first)}"
        )

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = own  # type: ignore[method-assign]


def _without_export(function: type, first: Exception) -> str:
    """Return what would make a model with this Function need no torch.export."""
    if function.__module__ == "torch.utils.checkpoint":
        return "call checkpoint with use_reentrant=False"
    if _PLAIN_TENSOR in str(first):
        return "register the tensors that the model holds beside its parameters and buffers as buffers"
    return "do without what fails there, or make the Function a custom op (torch.library.custom_op)"


def _joint(module: nn.Module, tensors: list[Tensor]) -> Any:
    # AOTAutograd brings torch.compile's front end, two seconds that whoever only reads a plan need not wait.
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

    with contextlib.ExitStack() as stack:
        return aot_export_joint_with_descriptors(stack, module, tuple(tensors))


def _register_plain_tensors(module: nn.Module) -> None:
    """Make buffers of tensors held as plain attributes, so that tracing lifts them to graph inputs."""
    for sub in module.modules():
        for name, value in list(vars(sub).items()):
            if isinstance(value, Tensor):
                delattr(sub, name)
                sub.register_buffer(name, value, persistent=False)


def _check_call(model: nn.Module, tensors: Sequence[Tensor]) -> None:
    if torch.is_inference_mode_enabled():
        raise UnsupportedModel("nothing can be trained under torch.inference_mode: leave it before planning a step")
    for i, t in enumerate(tensors):
        _check_dense(f"input {i}", t)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise UnsupportedModel(f"module {name!r} has sparse gradients; only dense ones are planned: sparse=False")


def check_model(model: nn.Module) -> None:
    """Raise UnsupportedModel for what could never be planned, naming the module, parameter or buffer."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(f"module {name!r} is scripted, and no trace sees into it: plan what it was made of")
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UnsupportedModel(f"parameter {name!r} is not initialised yet: call the model once before planning")
        _check_dense(f"parameter {name!r}", p)
    for name, b in model.named_buffers():
        _check_dense(f"buffer {name!r}", b)


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise UnsupportedModel(f"{name} is sparse ({tensor.layout}); only dense tensors are planned: use to_dense()")


_CUSTOM_OPS = "torch._library.autograd"  # where the Function of a custom op is made
_PLAIN_TENSOR = "allow_non_fake_inputs"  # torch's words where a tensor is neither parameter nor buffer
_SHAPE = "DynamicOutputShape"
_DATA = ("data-dependent", "Data-dependent", "_local_scalar_dense", "item()", "DataDependent", _SHAPE)


def _explain(model: nn.Module, first: Exception, second: Exception) -> CaptureError:
    """Say what failed, at which line of the model, and what would help."""
    # The second rung gets further: its line is the one to change.
    place = user_line(second) or user_line(first)
    if _PLAIN_TENSOR in str(first):  # what the second rung is for
        first = second
    lines = [f"cannot capture {type(model).__name__} as one graph: {_headline(first)}"]
    if place is not None:
        lines.append(f"  at {place}")
    layer = layer_of(second, model) or layer_of(first, model)
    if layer is not None:
        lines.append(f"  in layer {layer}")
    words = f"{_headline(first)} {first} {second}"
    if "forward() " in words and "argument" in words:
        lines.append("  example_inputs must be what model(*example_inputs, **example_kwargs) takes")
    elif _SHAPE in _headline(first):
        lines.append(
            "  the shape of what this op makes depends on a tensor's values (a boolean mask, nonzero, packed sequences,"
            " ctc_loss); use torch.where, or move the line outside the model: the loss of optimize is not captured"
        )
    elif any(w in words for w in _DATA):
        lines.append(
            "  this line asks a tensor for a Python value (if, int(), .item(), boolean mask), so the graph depends on "
            "data; use torch.where or move the decision outside the model"
        )
    if _headline(second) != _headline(first):
        lines.append(f"  with torch.export in front: {_headline(second)}")
    return CaptureError("\n".join(lines))


def _headline(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
