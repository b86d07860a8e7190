"""A model run on parts of the batch, one after the other, under one loss: its gradients accumulate over the parts.

Only one part's activations need be alive at a time, each part's being computed again in its backward. The loss sees all
outputs at once, so that whatever it averages over stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphplan.errors import NoParts
from graphplan.tree import Template

ROUNDING = 1e-3  # of the largest output: what another order of sums may change


def in_parts(model: Callable[..., Any], parts: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what `model(*args, **kwargs)` does, from `parts` calls on slices of every tensor's first dimension.

    Raises:
        NoParts: the tensors differ in their first dimension, or an output does not have it.
    """
    template, tensors = Template.of((tuple(args), kwargs))
    count = batch_size(tensors)
    if count < parts:
        raise NoParts(f"a batch of {count} has no {parts} parts")
    made: list[list[Tensor]] = []
    returned = template
    for i in range(parts):
        cut = slice(count * i // parts, count * (i + 1) // parts)
        some, more = template.fill([t[cut] for t in tensors])
        returned, leaves = Template.of(model(*some, **more))
        for leaf in leaves:
            if not leaf.dim() or leaf.shape[0] != cut.stop - cut.start:
                raise NoParts(
                    f"the model returns {tuple(leaf.shape)} for {cut.stop - cut.start} samples: what it averages over "
                    "is not known. Return outputs for each sample and give their loss as loss_fn"
                )
        made.append(leaves)
    return returned.fill([torch.cat(pieces) for pieces in zip(*made, strict=True)])


def batch_size(tensors: Sequence[Tensor]) -> int:
    """Return the first dimension that all tensors share.

    Raises:
        NoParts: there is none.
    """
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors}
    if len(sizes) != 1:
        raise NoParts(f"the inputs do not share a first dimension: {sorted(tuple(t.shape) for t in tensors)}")
    return sizes.pop()


def check_parts(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise NoParts for a model whose samples do not stand for themselves.

    Batch statistics are seen in the modules; whatever else mixes samples, in the outputs of the example batch in
    evaluation mode, where nothing is random and nothing is learnt.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise NoParts(f"{name!r} ({type(module).__name__}) would see the statistics of a part of the batch")
    modes = {m: m.training for m in modules.values()}
    try:
        model.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            _, whole = Template.of(model(*args, **kwargs))
            _, cut = Template.of(in_parts(model, 2, args, kwargs))
    except NoParts:
        raise
    except Exception as e:
        raise NoParts(f"the model does not run on a part of the batch ({type(e).__name__}: {e})") from e
    finally:
        for module, mode in modes.items():
            module.training = mode
    for a, b in zip(whole, cut, strict=True):
        if a.shape != b.shape or float((a - b).abs().max()) > ROUNDING * float(a.abs().max()):
            raise NoParts("what it returns for a sample depends on the other samples of the batch")
