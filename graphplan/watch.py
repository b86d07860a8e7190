"""watch: what a forward does to its model beside computing outputs, made visible to the trace or refused.

A trace sees ops. It does not see `self.mean = new`, which gives a buffer another tensor, nor `x.data = new`, which
gives a tensor other contents. Tensors that the model does not register are constants to it, trained or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphplan.errors import CaptureError
from graphplan.places import present_line


class TraceAgain(Exception):
    """No error: the forward gave buffers other tensors, of which the next trace hands out copies."""


@dataclass(frozen=True, slots=True)
class _Buffer:
    """One buffer of a module before the forward; `given` is what the forward finds there."""

    path: str
    own: dict[str, Tensor | None]
    name: str
    tensor: Tensor | None
    given: Tensor | None


class Watch:
    """One run of a model's forward inside a trace.

    `rebound` are the paths of the buffers that the forward is known to give other tensors; `finish` adds to them. The
    forward finds copies there, so that the old value stays what it is for outputs and for the backward when the new
    one is written over it. `prefix` stands in front of every path that is not the user's.
    """

    def __init__(self, model: nn.Module, rebound: set[str], prefix: str = "") -> None:
        self._model = model
        self._prefix = prefix
        self._rebound = rebound
        self._parameters = [(path, own, dict(own)) for path, own in self._owners("_parameters")]
        self._buffers = [self._hand_out(path, own, name) for path, own in self._owners("_buffers") for name in own]

    def _owners(self, kind: str) -> Iterator[tuple[str, dict[str, Tensor | None]]]:
        for path, module in self._model.named_modules():
            yield f"{path}." if path else "", vars(module)[kind]

    def _hand_out(self, path: str, own: dict[str, Tensor | None], name: str) -> _Buffer:
        tensor = own[name]
        if tensor is not None and path + name in self._rebound:
            with torch.no_grad():
                own[name] = tensor.clone()
        return _Buffer(path + name, own, name, tensor, own[name])

    def call(self, inputs: Iterable[Tensor], /, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns, its updates written in place; `inputs` are the tensors among the arguments.

        A buffer that held nothing may be filled with what hangs neither on these nor on what is trained: a table that
        the plain model makes once is made again in each planned step.

        Raises:
            CaptureError: it does what can neither be planned nor dropped.
            TraceAgain: `rebound` has become larger.
        """
        mode = _Mode(self, inputs)
        with mode:
            outputs = self._model(*args, **kwargs)
        self._check_names(mode)
        changed = [b for b in self._buffers if b.own.get(b.name) is not b.given]
        changed = [b for b in changed if b.tensor is not None or mode.hangs(b.own.get(b.name))]
        for buffer in changed:
            self._check(buffer)
        new = {b.path for b in changed} - self._rebound
        if new:
            self._rebound |= new
            raise TraceAgain
        with torch.no_grad():
            for buffer in self._buffers:
                if buffer.given is not buffer.tensor:
                    self._write(buffer)
        return outputs

    def _write(self, buffer: _Buffer) -> None:
        value = buffer.own[buffer.name]
        assert buffer.tensor is not None
        assert value is not None
        buffer.tensor.copy_(value.detach())
        buffer.own[buffer.name] = buffer.tensor

    def _check_names(self, mode: _Mode) -> None:
        """Refuse a parameter or a buffer that the forward made, removed or, of a parameter, replaced."""
        for path, own, before in self._parameters:
            for name in own.keys() | before.keys():
                if own.get(name) is not before.get(name):
                    raise CaptureError(
                        f"the forward assigns parameter {self.shown(path + name)!r}: a step trains the parameters that "
                        "the model has before it; assign it outside the forward"
                    )
        known = {b.path for b in self._buffers}
        for path, own in self._owners("_buffers"):
            for name, value in own.items():
                if path + name not in known and mode.hangs(value):
                    raise CaptureError(self._unknown(path + name, "registers"))

    def _check(self, buffer: _Buffer) -> None:
        """Refuse another tensor in the place of a buffer, unless it can be written over the old one."""
        old, new, path = buffer.tensor, buffer.own.get(buffer.name), self.shown(buffer.path)
        if old is None:
            raise CaptureError(self._unknown(buffer.path, "fills"))
        if not isinstance(new, Tensor):
            raise CaptureError(f"the forward takes away buffer {path!r}: do that outside the forward")
        if _kind(old) != _kind(new):
            raise CaptureError(
                f"the forward gives buffer {path!r} ({_shown(old)}) a tensor of another kind ({_shown(new)}): keep its "
                "shape, dtype and device, or do that outside the forward"
            )
        if new.requires_grad:
            raise CaptureError(
                f"the forward gives buffer {path!r} a tensor that requires grad, so that the next step's backward "
                "would go through this one: assign value.detach()"
            )
        if sum(b.tensor is old for b in self._buffers) > 1:
            raise CaptureError(
                f"the forward gives buffer {path!r}, which other modules share, another tensor, and they would keep "
                "the old one: write in place (copy_), or register a clone"
            )

    def _unknown(self, path: str, does: str) -> str:
        return (
            f"the forward {does} buffer {self.shown(path)!r}, which held no tensor before: register a tensor of the "
            "final shape in __init__, or call the model once before planning"
        )

    def shown(self, path: str) -> str:
        """Return the path as the user knows it."""
        return path.removeprefix(self._prefix)

    def trained(self) -> list[Tensor]:
        """Return the parameters that require grad."""
        return [p for _, own in self._owners("_parameters") for p in own.values() if p is not None and p.requires_grad]

    def path_of(self, tensor: Tensor) -> str | None:
        """Return where the model registers `tensor` now, None if it does not."""
        for kind in ("_parameters", "_buffers"):
            for path, own in self._owners(kind):
                for name, value in own.items():
                    if value is tensor:
                        return self.shown(path + name)
        return None


class _Mode(TorchFunctionMode):
    """Writes the contents that `x.data = new` gives a parameter or a buffer in place; refuses hidden parameters.

    Follows what hangs on the inputs and on what is trained.
    """

    def __init__(self, watch: Watch, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._watch = watch
        self._hang = {id(t): t for t in (*inputs, *watch.trained())}
        self._aliases: dict[int, tuple[Tensor, Tensor]] = {}  # the first shares the second's memory

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func == _SET_DATA:
            return self._set(*args)
        if func == _GET_DATA and torch.compiler.is_exporting():
            func = torch.Tensor.detach  # torch.export does not see the other
        result = func(*args, **(kwargs or {}))
        read = args[:1] if func in _OF_THE_FIRST else (*args, *(kwargs or {}).values())
        if func not in _OF_NONE and any(id(t) in self._hang for t in _tensors(read)):
            self._hang.update((id(t), t) for t in _tensors(result))
        if func in (_GET_DATA, torch.Tensor.detach):
            self._aliases[id(result)] = (result, args[0])
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(result)):
            self._check_reached(t for t in _tensors((*args, *(kwargs or {}).values())) if t.requires_grad)
        return result

    def hangs(self, value: Any) -> bool:
        """Return whether `value` is a tensor made of the inputs or of what is trained."""
        return id(value) in self._hang

    def _check_reached(self, tensors: Iterator[Tensor]) -> None:
        """Refuse a trainable tensor that is none of the trace's: it would be a constant, and get no gradient."""
        for t in tensors:
            if type(t) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(t):
                continue
            raise CaptureError(  # no UnsupportedModel, which is a TypeError: operators take those for themselves
                f"the forward reaches a tensor that requires grad ({_shown(t)}) past the model's parameters, and it "
                "would get no gradient: read it as the attribute of a module that registers it (register_parameter, "
                f"nn.ParameterList, nn.ModuleList), make views of it in the forward, or detach it{present_line()}"
            )

    def _set(self, tensor: Tensor, value: Tensor) -> None:
        path = self._watch.path_of(tensor)
        _, source = self._aliases.get(id(value), (value, value))
        if path is None:
            what, advice = "of a tensor", "write x.data.copy_(value), or another op in place (mul_, clamp_), instead"
        elif tensor.requires_grad:
            what, advice = f"of parameter {path!r}, which is trained", "do that after optimizer.step()"
        elif _kind(tensor) != _kind(value):
            what, advice = f"of {path!r}", "keep its shape, dtype and device, or do that outside the forward"
        elif self._watch.path_of(source) is not None:
            what, advice = (
                f"of {path!r} to another tensor's, with which it would share memory",
                "use x.data.copy_(value)",
            )
        else:
            with torch.no_grad():
                tensor.copy_(value)
            return
        raise CaptureError(f"the forward assigns .data {what}: no trace sees that; {advice}{present_line()}")


# Functions of tensors whose values they do not read, and those that read the first one's alone.
_OF_NONE = frozenset(
    [
        *(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like),
        *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty),
    ]
)
_OF_THE_FIRST = frozenset([Tensor.type_as, Tensor.to, Tensor.expand_as, Tensor.view_as])
_DATA: Any = Tensor.data  # of the class: what reads and writes it
_GET_DATA, _SET_DATA = _DATA.__get__, _DATA.__set__


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.dtype, tensor.device)


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
