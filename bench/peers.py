"""What people use today to train in less memory, each as a module with the model's own signature.

A peer yields settings; `build` returns a callable for one of them. Nothing is known about the models: the blocks that
`torch.utils.checkpoint` wraps are the outermost modules of a class that occurs more than once.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.ckptplan_peer import SHARES, Chooser

# 1 to 0 by 0.05: every half first, then every quarter, in case time runs out
BUDGETS = tuple(i / 20 for i in sorted(range(21), key=lambda i: (i % 10 > 0, i % 5 > 0, -i)))


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run one peer: `build(model)` returns the module to train; it may share the model's parameters."""

    method: str
    name: str
    build: Callable[[nn.Module], nn.Module]


def settings(
    model: nn.Module, run: Callable[[nn.Module], object], methods: set[str], ratios: tuple[float, ...] = BUDGETS
) -> Iterator[Setting]:
    """Yield every setting of the chosen methods that applies to `model`; `run(model)` is one forward."""
    if "checkpoint" in methods:
        yield from _checkpoint_settings(model)
    if "pytorch_budget" in methods:
        for ratio in ratios:
            yield Setting(
                "pytorch_budget", f"{ratio:g}", functools.partial(_compiled, ratio, "aot_eager_decomp_partition")
            )
    if "ckptplan" in methods and blocks(model):
        chooser = Chooser(tuple(blocks(model)), run)
        for share in SHARES:
            yield Setting("ckptplan", f"{share:.0%} of the activations", functools.partial(_chosen, chooser, share))
    if "inductor" in methods:
        for ratio in ratios:
            yield Setting("inductor", f"{ratio:g}", functools.partial(_compiled, ratio, "inductor"))


def blocks(model: nn.Module) -> list[str]:
    """Return the paths of the outermost modules whose class, not a layer of torch's own, occurs more than once."""
    own = {n: m for n, m in model.named_modules() if n and not type(m).__module__.startswith("torch.")}
    count = Counter(type(m) for m in own.values())
    several = [n for n, m in own.items() if count[type(m)] > 1]
    return [n for n in several if not any(n.startswith(o + ".") for o in several)]


def _checkpoint_settings(model: nn.Module) -> Iterator[Setting]:
    found = blocks(model)
    if not found:
        return
    for k in sorted({len(found), 3 * len(found) // 4, len(found) // 2, len(found) // 4} - {0}, reverse=True):
        name = "every block" if k == len(found) else f"{k} of {len(found)} blocks"
        yield Setting("checkpoint", name, functools.partial(_checkpointed, found[:k]))


def _checkpointed(paths: list[str], model: nn.Module) -> nn.Module:
    """Return a twin that shares parameters and buffers and checkpoints the named blocks."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    for path in paths:
        block = twin.get_submodule(path)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return twin


def _chosen(chooser: Chooser, share: float, model: nn.Module) -> nn.Module:
    return _checkpointed(chooser.choose(share, model), model)


def _compiled(ratio: float, backend: str, model: nn.Module) -> nn.Module:
    return _Compiled(model, ratio, backend)


class _Compiled(nn.Module):
    """The model under torch.compile; the memory budget is read when the first call compiles it.

    Inductor draws its random numbers as eager PyTorch does, so that gradients can be compared.
    """

    def __init__(self, model: nn.Module, ratio: float, backend: str) -> None:
        super().__init__()
        torch._dynamo.reset()
        self.model, self.ratio = model, ratio
        self.compiled = torch.compile(model, backend=backend, fullgraph=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _memory_budget(self.ratio):
            return self.compiled(*args, **kwargs)


@contextmanager
def _memory_budget(ratio: float) -> Iterator[None]:
    import torch._functorch.config as config
    import torch._inductor.config as inductor

    with config.patch(activation_memory_budget=ratio), inductor.patch(fallback_random=True):
        yield
