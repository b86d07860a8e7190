"""The peer ckptplan (PyPI 0.1.0rc1): dynamic programming over blocks under a budget of activation bytes.

Its own byte profile needs CUDA; on a CPU it plans nothing. So that it can be compared there, each block's bytes are
read on graphplan's meter by ckptplan's definition (what a forward of the block alone leaves allocated), and its
planner, untouched, chooses. Its container runs a bare chain of blocks; the model runs here whole, with
`torch.utils.checkpoint` around the blocks that it chose, as its container would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

SHARES = (0.75, 0.5, 0.25, 0.0)  # of all blocks' activation bytes


class NotComparable(Exception):
    """ckptplan cannot plan this model; the message says why."""


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses the blocks to checkpoint; profiles the model once, when first asked."""

    paths: tuple[str, ...]
    run: Callable[[nn.Module], object]  # one forward with the example inputs

    def choose(self, share: float, model: nn.Module) -> list[str]:
        """Return the paths that ckptplan checkpoints when `share` of the activation bytes may stay."""
        try:
            import ckptplan
        except ModuleNotFoundError as e:
            raise NotComparable("not installed: pip install ckptplan==0.1.0rc1") from e
        blocks = ckptplan.declare_blocks(model, [(p, model.get_submodule(p)) for p in self.paths])
        device = next(model.parameters()).device
        args = self._first_inputs(model)
        profiles = ckptplan.profile_blocks(blocks, args, device=device, num_warmup=1, num_trials=3)
        nbytes = _bytes(model, self.paths, self.run, device)
        known = [
            replace(p, timing_only=False, activation_bytes_estimate=b, activation_bytes_method="isolated_forward_delta")
            for p, b in zip(profiles, nbytes, strict=True)
        ]
        if not any(p.eligible_for_checkpoint for p in known):
            raise NotComparable(f"no block may be checkpointed: {known[0].exclusion_reason}")
        plan = ckptplan.plan_checkpoints(
            known,
            blocks,
            target_kind="activation_budget_bytes",
            target_value=share * sum(nbytes),
            on_infeasible="best_effort",
        )
        return [d.block_id for d in plan.decisions if d.checkpointed]

    def _first_inputs(self, model: nn.Module) -> tuple[Any, ...]:
        found: list[tuple[Any, ...]] = []
        hook = model.get_submodule(self.paths[0]).register_forward_pre_hook(lambda _, args: found.append(args))
        with torch.no_grad():
            self.run(model)
        hook.remove()
        return found[0]


def _bytes(model: nn.Module, paths: tuple[str, ...], run: Callable[[nn.Module], object], device: Any) -> list[int]:
    """Return what each block's forward leaves allocated, from one forward of the whole model."""
    from graphplan.meter import Meter

    meter, hooks = Meter(device), []
    with meter:
        for path in paths:
            hooks += _watched(model.get_submodule(path), meter)
        kept = run(model)
    del kept
    for hook in hooks:
        hook.remove()
    return [r.end_bytes for r in meter.readings]


def _watched(block: nn.Module, meter: Any) -> Iterator[Any]:
    regions: list[Any] = []

    def before(*_: object) -> None:
        regions.append(meter.region())
        regions[-1].__enter__()

    def after(*_: object) -> None:  # a hook that returns anything replaces the block's output
        regions.pop().__exit__(None, None, None)

    yield block.register_forward_pre_hook(before)
    yield block.register_forward_hook(after)
