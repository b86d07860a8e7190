"""Data: scikit-learn's digits, named downloads or synthetic images, split by flwr-datasets' partitioners."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from graphplan.federated.config import FederatedError

_SPECS = "write iid, dirichlet:ALPHA or pathological:CLASSES"
TEST_SHARE = 0.2
SYNTHETIC_COUNT = 2000
_DOWNLOADS = {  # name -> (repository, image column, label column)
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
    "femnist": ("flwrlabs/femnist", "image", "character"),
}


@dataclass(frozen=True, slots=True)
class Images:
    """Labelled images [N, C, H, W]; `synthetic` data stand for shapes, never for accuracy on a real task."""

    name: str
    images: Tensor
    labels: Tensor
    classes: int
    synthetic: bool = False

    def fitted(self, shape: tuple[int, ...]) -> Images:
        """Return the same images as a model takes them: [C, H, W], or [F] flattened.

        Raises:
            FederatedError: the model takes something that is no image.
        """
        if len(shape) == 1:
            side = math.isqrt(shape[0])
            if side * side != shape[0]:
                raise FederatedError(f"the model takes vectors of {shape[0]}: no square image has so many pixels")
            grey = self.images.mean(dim=1, keepdim=True)
            return replace(self, images=_resized(grey, (side, side)).flatten(1))
        if len(shape) != 3:
            raise FederatedError(f"the model takes inputs of shape {shape}; {self.name} has images")
        images = _resized(self.images, shape[1:])
        if images.shape[1] != shape[0]:
            images = images.mean(dim=1, keepdim=True).expand(-1, shape[0], -1, -1)
        return replace(self, images=images.contiguous())

    def split(self) -> tuple[Images, Images]:
        """Return training and test images: every fifth of a fixed shuffle is for testing."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))
        cut = int(len(order) * (1 - TEST_SHARE))
        return self.take(order[:cut]), self.take(order[cut:])

    def take(self, chosen: Tensor) -> Images:
        """Return the images at the indices `chosen`."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


def _digits() -> Images:
    data = importlib.import_module("sklearn.datasets").load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16 - 0.3
    return Images("digits", images, torch.from_numpy(data.target).long(), 10)


def _synthetic() -> Images:
    """CIFAR-shaped noise around one pattern a class: for figures of memory and time."""
    source = torch.Generator().manual_seed(1)
    patterns = torch.randn(10, 3, 32, 32, generator=source)
    labels = torch.randint(10, (SYNTHETIC_COUNT,), generator=source)
    images = patterns[labels] + 2 * torch.randn(SYNTHETIC_COUNT, 3, 32, 32, generator=source)
    return Images("synthetic", images, labels, 10, synthetic=True)


def _download(name: str) -> Images:
    repository, image, label = _DOWNLOADS[name]
    try:
        source = importlib.import_module("flwr_datasets").FederatedDataset(
            dataset=repository, partitioners={"train": 1}
        )
        data = source.load_split("train").with_format("numpy")
    except Exception as e:
        raise FederatedError(f"data {name!r} comes from {repository}, which cannot be read ({e}): try digits") from e
    pixels = torch.from_numpy(np.stack([np.atleast_3d(i) for i in data[image]])).permute(0, 3, 1, 2)
    labels = torch.from_numpy(np.asarray(data[label])).long()
    return Images(name, pixels.float() / 255 - 0.5, labels, int(labels.max()) + 1)


DATA: dict[str, Callable[[], Images]] = {
    "digits": _digits,
    "synthetic": _synthetic,
    **{name: (lambda name=name: _download(name)) for name in _DOWNLOADS},  # type: ignore[misc]
}


def load(name: str) -> Images:
    """Return the data called `name`.

    Raises:
        FederatedError: an unknown name, or data that the network does not give.
    """
    if name not in DATA:
        raise FederatedError(f"no data {name!r}; there are {', '.join(DATA)}")
    return DATA[name]()


@lru_cache(maxsize=8)
def _shares(labels: bytes, spec: str, clients: int, seed: int) -> tuple[NDArray[np.int64], ...]:
    values = np.frombuffer(labels, dtype=np.int64)
    partitioner = _partitioner(spec, clients, seed)
    rows = {"label": values.tolist(), "row": list(range(len(values)))}
    partitioner.dataset = importlib.import_module("datasets").Dataset.from_dict(rows)
    return tuple(np.array(partitioner.load_partition(i)["row"], dtype=np.int64) for i in range(clients))


def partition(labels: Tensor, spec: str, clients: int, seed: int) -> tuple[Tensor, ...]:
    """Return each client's row numbers. `spec`: "iid", "dirichlet:ALPHA" or "pathological:CLASSES".

    A client may have no row at all (Dirichlet with small alpha): it then has nothing to train on.

    Raises:
        FederatedError: another spec, or one that cannot be met.
    """
    shares = _shares(labels.numpy().tobytes(), spec, clients, seed)
    return tuple(torch.from_numpy(s.copy()) for s in shares)


def _partitioner(spec: str, clients: int, seed: int) -> Any:
    kind, _, value = spec.partition(":")
    made = importlib.import_module("flwr_datasets.partitioner")
    try:
        if kind == "iid" and not value:
            return made.IidPartitioner(clients)
        if kind == "dirichlet":
            return made.DirichletPartitioner(clients, "label", float(value), min_partition_size=0, seed=seed)
        if kind == "pathological":
            return made.PathologicalPartitioner(
                clients, "label", int(value), class_assignment_mode="first-deterministic", seed=seed
            )
    except (TypeError, ValueError) as e:
        raise FederatedError(f"partition {spec!r}: {e}; {_SPECS}") from e
    raise FederatedError(f"partition {spec!r}: {_SPECS}")


def _resized(images: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
