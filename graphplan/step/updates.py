"""The update ops of a planned step: one parameter's share of torch.optim's own functional optimizers.

An update works in pieces of PIECE elements, so that its temporaries never have a parameter's size. The arithmetic is
elementwise: pieces give the same bits as the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import adam as torch_adam
from torch.optim import sgd as torch_sgd
from torch.optim.optimizer import _get_scalar_dtype

PIECE = 1 << 18
State = dict[str, Any]  # one parameter's entry in `optimizer.state`, filled at its first update
Settings = Mapping[str, Any]  # one of `optimizer.param_groups`, read at every step


@dataclass(frozen=True, slots=True)
class Rule:
    """How one optimizer class updates one parameter.

    `update(param, grad, state, settings)` changes the parameter and its state in place, `of_product` does it for the
    gradient `a @ b`; `state_names` are the tensors of the parameter's geometry that it keeps, `counts` is whether it
    counts steps too; `weights` is how noise in a gradient is weighed (`graphplan.noise`).
    """

    update: Callable[[Tensor, Tensor, State, Settings], None]
    of_product: Callable[[Tensor, Tensor, Tensor, bool, State, Settings], None]
    state_names: Callable[[Settings], tuple[str, ...]]
    counts: bool
    weights: str


def sgd(param: Tensor, grad: Tensor | Product, state: State, settings: Settings) -> None:
    """Apply torch.optim.SGD to one parameter."""
    keeps = settings["momentum"] != 0
    buffer = state.get("momentum_buffer") if keeps else None
    made = torch.empty_like(param) if keeps and buffer is None else None  # the first step's gradient starts it
    for piece in _pieces(param, settings):
        buffers = [None if buffer is None else _part(buffer, piece)]
        torch_sgd.sgd(
            [_part(param, piece)],
            [_matching(_part(grad, piece), param, settings)],
            buffers,
            weight_decay=settings["weight_decay"],
            momentum=settings["momentum"],
            lr=settings["lr"],
            dampening=settings["dampening"],
            nesterov=settings["nesterov"],
            maximize=settings["maximize"],
            foreach=_foreach(param, settings),
            fused=settings["fused"],
        )
        if made is not None and buffers[0] is not None:
            made[piece].copy_(buffers[0])
    if made is not None:
        state["momentum_buffer"] = made


def adam(param: Tensor, grad: Tensor | Product, state: State, settings: Settings) -> None:
    """Apply torch.optim.Adam or AdamW (`decoupled_weight_decay`) to one parameter."""
    if not state:
        _begin_adam(param, state, settings)
    beta1, beta2 = settings["betas"]
    before, step = state["step"], state["step"]
    for piece in _pieces(param, settings):
        step = before.clone()  # each piece counts the step once
        torch_adam.adam(
            [_part(param, piece)],
            [_matching(_part(grad, piece), param, settings)],
            [_part(state["exp_avg"], piece)],
            [_part(state["exp_avg_sq"], piece)],
            [_part(state["max_exp_avg_sq"], piece)] if settings["amsgrad"] else [],
            [step],
            foreach=_foreach(param, settings),
            capturable=settings["capturable"],
            fused=settings["fused"],
            decoupled_weight_decay=settings["decoupled_weight_decay"],
            amsgrad=settings["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            maximize=settings["maximize"],
        )
    before.copy_(step)


@dataclass(frozen=True, slots=True)
class Product:
    """A gradient `a @ b` (`turned`: its transpose) that is computed piece by piece, where it is read."""

    a: Tensor
    b: Tensor
    turned: bool

    def __getitem__(self, piece: Any) -> Tensor:
        """Return rows of the gradient."""
        if piece is ...:
            return (self.a @ self.b).t() if self.turned else self.a @ self.b
        return (self.a @ self.b[:, piece]).t() if self.turned else self.a[piece] @ self.b


def sgd_of_product(param: Tensor, a: Tensor, b: Tensor, turned: bool, state: State, settings: Settings) -> None:
    """Apply torch.optim.SGD with the gradient `a @ b`, which never exists whole."""
    sgd(param, Product(a, b, turned), state, settings)


def adam_of_product(param: Tensor, a: Tensor, b: Tensor, turned: bool, state: State, settings: Settings) -> None:
    """Apply torch.optim.Adam or AdamW with the gradient `a @ b`, which never exists whole."""
    adam(param, Product(a, b, turned), state, settings)


def _begin_adam(param: Tensor, state: State, settings: Settings) -> None:
    """Fill `state` as torch.optim.Adam does at a parameter's first step."""
    on_device = settings["capturable"] or settings["fused"]
    dtype = _get_scalar_dtype(is_fused=settings["fused"])  # type: ignore[no-untyped-call]
    state["step"] = torch.zeros((), dtype=dtype, device=param.device if on_device else "cpu")
    for name in _adam_state(settings):
        state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)


def _sgd_state(settings: Settings) -> tuple[str, ...]:
    return ("momentum_buffer",) if settings["momentum"] != 0 else ()


def _adam_state(settings: Settings) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if settings["amsgrad"] else ()))


RULES: dict[type, Rule] = {
    torch.optim.SGD: Rule(sgd, sgd_of_product, _sgd_state, counts=False, weights="sgd"),
    torch.optim.Adam: Rule(adam, adam_of_product, _adam_state, counts=True, weights="adam"),
    torch.optim.AdamW: Rule(adam, adam_of_product, _adam_state, counts=True, weights="adam"),
}


def _pieces(param: Tensor, settings: Settings) -> Iterable[Any]:
    """Return indices that cut a parameter along its first dimension into pieces of about PIECE elements.

    The fused kernels need no temporaries, and a parameter without dimensions cannot be cut.
    """
    if param.numel() <= PIECE or settings["fused"] or param.dim() == 0:
        return (...,)
    rows = max(1, PIECE * param.shape[0] // param.numel())
    return [slice(start, start + rows) for start in range(0, param.shape[0], rows)]


def _part(whole: Tensor | Product, piece: Any) -> Tensor:
    """Return a piece; all of a tensor is itself, as a view of it would take as long as a small update."""
    return whole if piece is ... and isinstance(whole, Tensor) else whole[piece]


def _foreach(param: Tensor, settings: Settings) -> bool | None:
    """Return torch.optim's choice between its loops; on CPU it is known, and to ask takes as long as a small update."""
    chosen: bool | None = settings["foreach"]
    return False if chosen is None and not settings["fused"] and param.is_cpu else chosen


def _matching(grad: Tensor, param: Tensor, settings: Settings) -> Tensor:
    """Return the gradient as the fused kernels need it: they walk the memory, whatever the strides."""
    if not settings["fused"] or grad.stride() == param.stride():
        return grad
    return torch.empty_like(param).copy_(grad)
