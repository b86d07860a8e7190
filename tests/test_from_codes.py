"""Backward ops that run from codes: of views, of several codes at once, and with what the forward saved made anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphplan
from graphplan import functions
from graphplan.codecs.from_codes import AGAIN, sums_scores
from graphplan.instructions import Instruction, Instructions
from tests.lossy_cases import all_encoded, gradients, offered, sequences, token_loss, transformer

aten = torch.ops.aten
B, T, C, HEADS = 8, 16, 64, 4


class Attention(nn.Module):
    """One product of x gives queries, keys and values (`joined`), or one each does."""

    def __init__(self, joined: bool = True, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.joined, self.causal = joined, causal
        self.qkv = nn.ModuleList([nn.Linear(C, 3 * C)] if joined else [nn.Linear(C, C) for _ in "qkv"])
        self.out = nn.Linear(C, C)

    def parts(self, x: Tensor) -> list[Tensor]:
        return list(self.qkv[0](x).chunk(3, dim=-1)) if self.joined else [linear(x) for linear in self.qkv]

    def attend(self, parts: list[Tensor]) -> Tensor:
        q, k, v = (p.view(B, T, HEADS, C // HEADS).transpose(1, 2) for p in parts)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(B, T, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(self.parts(x)))


def words() -> Tensor:
    return 3 * torch.randn(B, T, C, generator=torch.Generator().manual_seed(1))


def from_codes_of_attention(instructions: Instructions, codec: str) -> list[Instruction]:
    return [
        i for i in instructions.items if i.kind == "variant" and "attention" in i.name and f"from_{codec}" in i.name
    ]


@pytest.mark.parametrize("joined", [True, False])
def test_every_combination_of_codes(joined: bool) -> None:
    """q, k and v in one storage, and the result: two codes, three ways; in storages of their own fifteen."""
    _, instructions = offered(Attention(joined), words())
    assert len(from_codes_of_attention(instructions, "int4")) == (3 if joined else 15)
    assert len(instructions.by_name()) == len(instructions.items)
    codes = {e.id for e in instructions.encoded}
    for i, parts in instructions.joint().items():
        read = [codes & set(instructions.items[p].reads) for p in parts]
        assert set().union(*read) == codes & set(instructions.items[i].reads)
        assert all(len(r) == 1 for r in read)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("result", [True, False])
def test_gradients_are_those_of_the_decoded_queries(causal: bool, result: bool) -> None:
    """Not of decoded scores over the sum of the true ones: as if the model had computed q, k and v so."""
    model, x = Attention(causal=causal), words()
    captured, instructions = offered(model, x)
    steps = all_encoded(captured, instructions, "int2", only=None if result else "addmm")
    assert any("_and_" in s for s in steps) == result
    output, grads = gradients(captured, instructions, steps, model, x)
    assert torch.equal(output, model(x))
    qkv = model.qkv[0](x).detach()
    storage = next(s.id for s in captured.graph.storages if s.name == "addmm")
    code = functions.quantise(qkv.view(-1, 3 * C), 2, functions.mix(3, 0), storage)
    decoded = functions.dequantise(code, 2, qkv.view(-1, 3 * C).shape, (3 * C, 1), torch.float32).view_as(qkv)
    assert not torch.equal(decoded, qkv)
    attended = model.attend(list(qkv.chunk(3, dim=-1))).requires_grad_()
    (upstream,) = torch.autograd.grad(model.out(attended).sin().sum(), attended)
    leaf = decoded.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(model.attend(list(leaf.chunk(3, dim=-1))), leaf, upstream)
    assert torch.allclose(grads["qkv.0.bias"], wanted.sum((0, 1)), rtol=1e-4, atol=1e-5)
    exact = torch.autograd.grad(model(x).sin().sum(), model.qkv[0].bias)[0]
    assert not torch.allclose(grads["qkv.0.bias"], exact, rtol=1e-2)


def test_a_mask_of_scores_has_no_code() -> None:
    """Four codes of q, k, v and result go together in fifteen ways, and the mask, added to scores, is read as it is."""

    class Masked(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p.view(B, T, HEADS, C // HEADS).transpose(1, 2) for p in self.parts(x))
            near = torch.where((torch.arange(T)[:, None] >= torch.arange(T))[None, None], x.new_zeros(()), -1e4)
            bias = near + 0 * x[:, None, :, :T]  # made in the forward, one for each sample
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            return self.out(y.transpose(1, 2).reshape(B, T, C))

    captured, instructions = offered(Masked(joined=False), words())
    found = from_codes_of_attention(instructions, "int4")
    assert len(found) == 15
    attention = next(op for op in captured.graph.ops if op.backward and "attention" in op.name)
    (mask,) = captured.graph.storages_of[attention.node.kwargs["attn_mask"].name]
    assert all(mask in item.reads for item in found)


def test_other_attentions_have_no_codes_of_scores() -> None:
    """A backward that reads the sum of its forward's scores needs that forward again, by a line of AGAIN."""
    ours = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    others = (aten._scaled_dot_product_flash_attention_backward.default, aten._flash_attention_backward.default)
    assert sums_scores(ours)
    assert ours in AGAIN
    assert all(sums_scores(op) and op not in AGAIN for op in others)
    assert not sums_scores(aten.native_layer_norm_backward.default)


def test_a_plan_with_an_attention_from_both_codes_keeps_its_promises() -> None:
    """Bytes by the meter, noise by a joint measurement, and what the plan says survives shipping."""
    torch.manual_seed(0)
    (x, targets), model = sequences(), transformer()
    loss = {"loss_fn": token_loss, "example_targets": targets}
    here = graphplan.optimize(model, "100%", (x,), time_limit=4, codecs="lossy", **loss)
    device = here.device_profile
    ours = [k for k, s in device.samples.items() if s.target in ("encode", "decode") or s.target.endswith(":variant")]
    device.samples.update({k: replace(device.samples[k], cost_ns=1) for k in ours})
    more = {"gradient_noise": 0.2, "device": device, "noise": here.entry().prepared.noise, **loss}
    low, top = here.plan.minimum_peak_bytes, here.plan.baseline_peak_bytes
    seen = False
    for part in (0.05, 0.1, 0.2):
        budget = int(low + part * (top - low))
        planned = graphplan.optimize(model, budget, (x,), time_limit=4, codecs="lossy", **more)
        seen = seen or any("_and_" in s for s in planned.plan.steps)
        report = graphplan.verify(planned, model, (x,), **loss)
        assert report.peak_bytes <= planned.plan.peak_bytes <= budget
        assert graphplan.Plan.from_json(planned.plan.to_json()) == planned.plan
    assert seen
