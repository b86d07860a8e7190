"""Task: what is trained and how well it does: the model, its batches, its loss, the test images."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphplan.cli.models import resolve
from graphplan.device import Device
from graphplan.federated.config import FederatedError, RunConfig
from graphplan.federated.data import Images, load, partition
from graphplan.federated.shrink import shrink
from graphplan.optimize import Options, make_options

EVALUATION_BATCH = 256


@dataclass(frozen=True, slots=True)
class Task:
    """One model on one set of images. `example` is a training batch: images [B, ...] and labels [B]."""

    model: nn.Module
    train: Images
    test: Images
    example: tuple[Tensor, Tensor]

    def fresh(self) -> nn.Module:
        """Return a copy of the model, in training mode, that the caller may change."""
        return copy.deepcopy(self.model).train()

    def check(self, config: RunConfig) -> None:
        """Raise FederatedError now where the data cannot be split as the run asks."""
        partition(self.train.labels, config.partition, config.clients, config.seed)

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Return (accuracy, mean loss) on the test images."""
        model.eval()
        right, total = 0, 0.0
        with torch.no_grad():
            for start in range(0, len(self.test.labels), EVALUATION_BATCH):
                images = self.test.images[start : start + EVALUATION_BATCH]
                labels = self.test.labels[start : start + EVALUATION_BATCH]
                outputs = model(images)
                right += int((outputs.argmax(1) == labels).sum())
                total += float(F.cross_entropy(outputs, labels, reduction="sum"))
        return right / len(self.test.labels), total / len(self.test.labels)


def task_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of logits [B, classes] at labels [B]: what every client minimises."""
    return F.cross_entropy(outputs, labels)


def task_options(
    task: Task, budget: int | str, codecs: str | Iterable[str], solver: str = "auto", time_limit: float = 30.0,
    device: Device | None = None,
) -> Options:  # fmt: skip
    """Return how a task's step is planned."""
    return make_options(
        budget, codecs, solver=solver, time_limit=time_limit, device=device, loss_fn=task_loss,
        example_targets=task.example[1],
    )  # fmt: skip


@lru_cache(maxsize=4)
def make_task(model: str, size: str, data: str, batch: int, seed: int, width: float = 1.0) -> Task:
    """Return the task that a run's options name; `width` is the fraction of channels kept.

    Raises:
        BadInput, FederatedError: the model or the data cannot be had, or do not go together.
    """
    zoo = model.startswith("models_zoo:")
    named = resolve(model, size if zoo else "real", batch if zoo else None, seed=seed)
    if len(named.inputs) != 1 or not isinstance(named.inputs[0], Tensor):
        raise FederatedError(f"{model} takes {len(named.inputs)} inputs; a federated task has images alone")
    like = named.inputs[0]
    train, test = images_of(data, tuple(like.shape[1:]))
    if like.dtype != train.images.dtype:
        raise FederatedError(f"{model} takes {like.dtype}; {data} has images of {train.images.dtype}")
    rows = torch.arange(batch) % len(train.labels)
    example = (train.images[rows], train.labels[rows])
    torch.manual_seed(seed)
    module = shrink(named.module, width, (example[0],))
    with torch.no_grad():
        outputs = copy.deepcopy(module)(example[0])
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < train.classes:
        raise FederatedError(f"{model} must give logits [batch, at least {train.classes}] for {data}")
    return Task(module, train, test, example)


def task_of(config: RunConfig, width: float = 1.0) -> Task:
    """Return the task of a run."""
    return make_task(config.model, config.size, config.data, config.batch, config.seed, width)


@lru_cache(maxsize=4)
def images_of(data: str, shape: tuple[int, ...] | None) -> tuple[Images, Images]:
    """Return training and test images as a model takes them; no shape: as they are."""
    found = load(data)
    return (found if shape is None else found.fitted(shape)).split()


def share_of(config: RunConfig, train: Images, client: int) -> Images:
    """Return the images of one client."""
    rows = partition(train.labels, config.partition, config.clients, config.seed)
    return train.take(rows[client])


def batches(images: Images, batch: int, epochs: int, seed: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield full batches of every epoch in a seeded order; the last one of an epoch is filled up from its start.

    One shape for all batches: one plan serves them.
    """
    count = len(images.labels)
    source = torch.Generator().manual_seed(number_of(seed))
    for _ in range(epochs):
        order = torch.randperm(count, generator=source)
        for start in range(0, count, batch):
            chosen = order[torch.arange(start, start + batch) % count]
            yield images.images[chosen], images.labels[chosen]


def number_of(text: str) -> int:
    """Return the same number for the same text in every process: a seed."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
