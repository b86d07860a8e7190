"""Naming an optimizer: `--step sgd|momentum|adam|adamw` plans, runs and checks whole training steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.optim import Optimizer

from graphplan.cli.models import Named
from graphplan.cli.output import BadInput
from graphplan.measure import default_loss

LEARNING_RATE = 0.01
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters),
    "adamw": lambda parameters: torch.optim.AdamW(parameters),
}
StepName = Annotated[
    str | None,
    typer.Option("--step", help=f"Whole training steps, loss and update inside: {', '.join(OPTIMIZERS)}."),
]


def check_step(step: str) -> None:
    """Raise BadInput for an optimizer that is not in the table."""
    if step not in OPTIMIZERS:
        raise BadInput(f"--step {step!r}: choose from {', '.join(OPTIMIZERS)}")


def optimizer_of(step: str, named: Named) -> Optimizer:
    """Return a new optimizer over the model's trainable parameters."""
    return OPTIMIZERS[step]([p for p in named.module.parameters() if p.requires_grad])


def loss_of(named: Named) -> Callable[..., Tensor]:
    """Return the model's loss, or the sum of its outputs."""
    return named.loss_fn or default_loss
