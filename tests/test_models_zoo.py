"""The models of models_zoo build, train one step and are fed reproducibly."""

from __future__ import annotations

import pytest
import torch

import models_zoo
from models_zoo import MODELS, Entry, Example

PUBLISHED_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "vgg16_bn": 138_365_992,
    "mobilenet_v2": 3_504_872,
    "densenet121": 7_978_856,
    "vit": 22_050_664,
    "cnn": 1_663_370,
}

every_model = pytest.mark.parametrize("entry", MODELS.values(), ids=MODELS.keys())


def _step(entry: Entry, example: Example) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = entry.build_small().train()
    loss = entry.loss(model(*example.inputs), example.targets)
    loss.backward()
    return model, loss


def _tensors(example: Example) -> list[torch.Tensor]:
    return [*example.inputs, *([] if example.targets is None else [example.targets])]


def test_registry_is_keyed_by_name_and_the_factories_are_reachable() -> None:
    """Each key is its entry's name, and `models_zoo:<name>` is the factory of the real size."""
    assert len(MODELS) == 12
    for name, entry in MODELS.items():
        assert entry.name == name
        assert getattr(models_zoo, name) is entry.build
        assert entry.source


@every_model
def test_one_small_step_gives_a_finite_loss_and_every_gradient(entry: Entry) -> None:
    """One training step yields a finite scalar and a finite gradient for every parameter."""
    model, loss = _step(entry, entry.example_small())
    assert loss.shape == ()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@every_model
def test_another_batch_size_works(entry: Entry) -> None:
    """The small model takes a batch of another size, which every input and target then has."""
    example = entry.example_small(batch=3)
    assert {tensor.shape[0] for tensor in _tensors(example)} == {3}
    assert torch.isfinite(_step(entry, example)[1])


@every_model
def test_examples_follow_the_seed_and_leave_the_global_generator(entry: Entry) -> None:
    """A seed fixes the batch, another seed changes it, and the global generator does not move."""
    before = torch.get_rng_state()
    for make in (entry.example_small, entry.example):
        first, again, other = make(), make(seed=0), make(batch=None, seed=1)
        assert all(torch.equal(a, b) for a, b in zip(_tensors(first), _tensors(again), strict=True))
        assert not torch.equal(first.inputs[0], other.inputs[0])
        assert [t.shape for t in _tensors(first)] == [t.shape for t in _tensors(other)]
        assert (first.targets is None) == (entry.name == "gpt")
    assert torch.equal(before, torch.get_rng_state())


def test_gpt_without_targets_returns_the_logits_its_loss_is_made_of() -> None:
    """The language model's own loss is the cross entropy of the logits it returns without targets."""
    entry = MODELS["gpt"]
    model = entry.build_small().eval()
    tokens, targets = entry.example_small().inputs
    logits = model(tokens)
    assert logits.shape == (*tokens.shape, 128)
    torch.testing.assert_close(model(tokens, targets), models_zoo.entry.token_loss(logits, targets))


def test_gpt_does_not_look_ahead() -> None:
    """Changing the last token leaves the logits of every earlier position as they were."""
    entry = MODELS["gpt"]
    model = entry.build_small().eval()
    tokens = entry.example_small().inputs[0]
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 128
    torch.testing.assert_close(model(tokens)[:, :-1], model(changed)[:, :-1])


def test_bert_ignores_tokens_outside_the_attention_mask() -> None:
    """Changing tokens that are not attended leaves the logits of the attended ones as they were."""
    entry = MODELS["bert"]
    model = entry.build_small().eval()
    tokens, mask = entry.example_small().inputs
    assert not mask.all()
    changed = torch.where(mask, tokens, (tokens + 1) % 128)
    torch.testing.assert_close(model(tokens, mask)[mask], model(changed, mask)[mask])


def test_lstm_cell_equals_the_one_of_torch() -> None:
    """The cell of linear layers computes what torch's fused cell does with the same weights."""
    torch.manual_seed(0)
    cell = MODELS["lstm"].build_small().get_submodule("cells.0")
    fused = torch.nn.LSTMCell(16, 32)
    with torch.no_grad():
        fused.weight_ih.copy_(cell.get_parameter("from_input.weight"))
        fused.bias_ih.copy_(cell.get_parameter("from_input.bias"))
        fused.weight_hh.copy_(cell.get_parameter("from_hidden.weight"))
        fused.bias_hh.zero_()
    x, state = torch.randn(4, 16), (torch.randn(4, 32), torch.randn(4, 32))
    torch.testing.assert_close(cell(x, state), fused(x, state))


def test_resnet18_options_change_the_stem_the_channels_and_the_classes() -> None:
    """The small-input stem keeps the resolution, and channels and classes are as asked."""
    model = models_zoo.resnet18(num_classes=7, in_channels=1, small_input=True).eval()
    images = torch.randn(2, 1, 16, 16)
    assert model.stem(images).shape == (2, 64, 16, 16)
    assert model(images).shape == (2, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_real_size_has_the_published_number_of_parameters(name: str) -> None:
    """The real size has as many parameters as the published model of that name."""
    with torch.device("meta"):
        model = MODELS[name].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]
