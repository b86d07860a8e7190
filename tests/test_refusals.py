"""What cannot be planned is refused before anything is planned, with what would work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import graphplan

X = torch.randn(4, 8)
SPARSE = torch.eye(4).to_sparse()


class Doing(nn.Module):
    """Has a layer that it does not register, the weight of one that it does, and a view of it."""

    def __init__(self, does: Callable[..., object]) -> None:
        super().__init__()
        self.a, self.does = nn.Linear(8, 8), does
        self.hidden = [nn.Linear(8, 8)]
        self.own = [self.a.weight]
        self.view = self.a.weight[:4]

    def forward(self, *inputs: Tensor) -> object:
        return self.does(self, *inputs)


def refused(model: nn.Module, says: str, *inputs: Tensor, error: type[Exception] = graphplan.UnsupportedModel) -> None:
    with pytest.raises(error, match=says):
        graphplan.optimize(model, "100%", inputs or (X,), time_limit=2)


@pytest.mark.parametrize(
    "does",
    [
        lambda m, x: m.hidden[0](m.a(x)),
        lambda m, x: m.a(m.hidden[0](x)),
        lambda m, x: m.a(x) @ m.own[0],
        lambda m, x: F.linear(m.a(x), m.own[0]),
        lambda m, x: m.a(x) @ m.view.T,
        lambda m, x: torch.cat([m.a(x), m.view]),
    ],
)
def test_trained_tensors_that_no_module_registers(does: Callable[..., object]) -> None:
    says = r"requires grad \(float32\[., 8\].*nn\.ParameterList.*\n  at .*in <lambda>"
    refused(Doing(does), says, error=graphplan.CaptureError)


def frozen(m: Doing, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.hidden[0](x)
    out: Tensor = m.a(x) * y @ m.hidden[0].weight.detach()
    return out


def test_those_that_are_not_trained_are_constants() -> None:
    model = Doing(frozen)
    planned = graphplan.optimize(model, "100%", X, time_limit=2)
    assert torch.equal(planned(X), model(X))


@pytest.mark.parametrize("does", [lambda m, x: m.a(x).detach(), lambda m, x: m.a(x).argmax(1), lambda m, x: x * 2])
def test_no_gradient_at_all(does: Callable[..., object]) -> None:
    refused(Doing(does), "no output depends on a trainable parameter")


def test_inference_mode_and_no_grad() -> None:
    with torch.inference_mode():
        refused(nn.Linear(8, 8), "inference_mode")
    with torch.no_grad():
        assert graphplan.optimize(nn.Linear(8, 8), "100%", X, time_limit=2).plan.peak_bytes


@pytest.mark.parametrize(
    ("does", "place"),
    [
        (lambda m, x: {"y": m.a(x), "log": [x, m.a(x).mean().item()]}, r"\['log'\]\[1\]"),
        (lambda m, x: (m.a(x), m.a(x).sum().item()), r"\[1\]"),
    ],
)
def test_numbers_among_the_outputs(does: Callable[..., object], place: str) -> None:
    refused(Doing(does), rf"outputs{place}\): return the tensor.*item", error=graphplan.CaptureError)


def test_sparse_tensors() -> None:
    refused(nn.Embedding(9, 4, sparse=True), "module '' has sparse gradients.*sparse=False", torch.tensor([1]))
    frozen = nn.Embedding(9, 8, sparse=True).requires_grad_(False)
    graphplan.optimize(nn.Sequential(frozen, nn.Linear(8, 1)), "100%", torch.tensor([1]), time_limit=2)
    refused(
        Doing(lambda m, i: F.embedding(i, m.a.weight, sparse=True)),
        "is a sparse tensor.*sparse=False",
        torch.tensor([1]),
    )
    for sparse in (SPARSE, SPARSE.to_sparse_csr()):
        refused(Doing(lambda m, x, s: s @ m.a(x)), r"input 1 is sparse.*to_dense", X, sparse)
    refused(Doing(lambda m, x: torch.sparse.mm(SPARSE, m.a(x))), r"is a sparse tensor.*to_dense")
    model = Doing(lambda m, x: torch.sparse.mm(m.adjacency, m.a(x)))
    model.register_buffer("adjacency", SPARSE)
    refused(model, r"buffer 'adjacency' is sparse.*to_dense")


def test_generators_and_scripts() -> None:
    noise = Doing(lambda m, x: m.a(x) + torch.randn(8, generator=torch.Generator().manual_seed(0)))
    refused(noise, "torch.Generator.*manual_seed")
    refused(nn.Sequential(torch.jit.script(nn.Linear(8, 8))), "module '0' is scripted")


def test_a_reentrant_checkpoint() -> None:
    reentrant = Doing(lambda m, x: checkpoint(m.a, m.a(x), use_reentrant=True))
    refused(reentrant, r"CheckpointFunction.*use_reentrant=False\n  without torch\.export: RuntimeError")


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


def test_a_weight_that_the_forward_changes() -> None:
    says = r"the forward changes parameter '0\.weight', which is trained.*optimizer\.step"
    refused(nn.Sequential(Clamped(8, 8)), says, error=graphplan.CaptureError)
    refused(nn.Sequential(nn.Embedding(9, 4, max_norm=1.0)), says, torch.tensor([1]), error=graphplan.CaptureError)


def test_a_layer_of_torch_that_asks_for_a_value_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None))
    says = r"cannot capture Sequential(.|\n)*in layer '1' \(BatchNorm1d\)"
    refused(model, says, error=graphplan.CaptureError)
    with pytest.raises(graphplan.CaptureError, match=says):
        graphplan.train_step(
            model, lambda o: o.mean(), torch.optim.SGD(model.parameters(), 0.1), "100%", X, time_limit=2
        )


class Unclear:
    """Holds a tensor and cannot be copied."""

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __reduce__(self) -> str:
        raise TypeError("not this one")


def test_structures_that_cannot_be_copied_are_named() -> None:
    packed = pack_padded_sequence(torch.randn(2, 3, 8), [3, 2], batch_first=True)
    refused(Doing(lambda m, x: m.a(x.data)), "takes or returns PackedSequence", packed, error=graphplan.CaptureError)
    refused(Doing(lambda m, x: Unclear(m.a(x))), "takes or returns Unclear", error=graphplan.CaptureError)
