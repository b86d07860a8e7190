"""shrink: the same architecture with fewer channels, for the baseline that makes the model fit its weakest client."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphplan.federated.config import FederatedError

_LAYERS = (nn.Conv2d, nn.Linear)


def shrink(model: nn.Module, ratio: float, inputs: Sequence[Any]) -> nn.Module:
    """Return a fresh model whose hidden layers have `ratio` of the channels; inputs and outputs stay as they are.

    Convolutions, linear layers and norms are made anew; everything else must take any number of channels.

    Raises:
        FederatedError: the narrower model cannot be run, e.g. because its code names a width.
    """
    if ratio == 1:
        return model
    order = _call_order(model, inputs)
    if not order:
        raise FederatedError(f"{type(model).__name__} has no convolution or linear layer to make narrower")
    small = copy.deepcopy(model)
    names = {m: n for n, m in model.named_modules()}
    for module in model.modules():
        made = _narrow(module, ratio, last=module is order[-1])
        if made is not None:
            parent, _, leaf = names[module].rpartition(".")
            setattr(small.get_submodule(parent), leaf, made.train(module.training))
    with torch.no_grad():
        try:
            small.eval()(*inputs)  # makes the parameters
        except (RuntimeError, ValueError) as e:
            raise FederatedError(f"{type(model).__name__} cannot be made narrower by {ratio}: {e}") from e
    return small.train(model.training)


def _call_order(model: nn.Module, inputs: Sequence[Any]) -> list[nn.Module]:
    """Return the layers as one forward calls them: the first takes the input, the last gives the answer."""
    order: list[nn.Module] = []
    probe = copy.deepcopy(model)
    originals = dict(zip(probe.modules(), model.modules(), strict=True))
    note: Callable[[nn.Module, Any], None] = lambda module, _: order.append(originals[module])  # noqa: E731
    for module in probe.modules():
        if isinstance(module, _LAYERS):
            module.register_forward_pre_hook(note)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        probe(*inputs)
    return order


def _narrow(module: nn.Module, ratio: float, *, last: bool) -> nn.Module | None:
    """Return the narrow layer; how many channels come in is read off its first call."""
    if isinstance(module, nn.Conv2d):
        if module.groups not in (1, module.in_channels):
            raise FederatedError("grouped convolutions that are not depthwise cannot be made narrower")
        groups = 1 if module.groups == 1 else _scaled(module.in_channels, ratio)
        go = module.out_channels if last else _scaled(module.out_channels, ratio)
        size: dict[str, Any] = {k: getattr(module, k) for k in ("kernel_size", "stride", "padding", "dilation")}
        return nn.LazyConv2d(go, groups=groups, bias=module.bias is not None, **size)
    if isinstance(module, nn.Linear):
        go = module.out_features if last else _scaled(module.out_features, ratio)
        return nn.LazyLinear(go, bias=module.bias is not None)
    if isinstance(module, nn.BatchNorm2d):
        return nn.LazyBatchNorm2d(eps=module.eps, momentum=module.momentum)
    return None


def _scaled(channels: int, ratio: float) -> int:
    return max(1, round(channels * ratio))


def same_shapes(a: nn.Module, b: dict[str, Tensor]) -> bool:
    """Return whether a state of these names and shapes belongs to module `a`."""
    mine = a.state_dict()
    return mine.keys() == b.keys() and all(mine[k].shape == b[k].shape for k in mine)
