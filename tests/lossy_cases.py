"""Small models that lossy codecs have something to do in, and programs with everything encoded: for several tests."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphplan.capture import Capture, capture
from graphplan.codecs import choose_codecs
from graphplan.instructions import Instructions, instructions_of
from graphplan.rewrite import rewrite
from graphplan.runtime import Step
from graphplan.state import lookup


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for wide, out in ((3, 12), (12, 12), (12, 12), (12, 12)):
        layers += [nn.Conv2d(wide, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        parts = self.qkv(self.norms[0](x)).view(b, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).reshape(b, t, c))
        return x + F.dropout(self.down(F.gelu(self.up(self.norms[1](x)))), 0.1)


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), Block(64), Block(64), nn.LayerNorm(64), nn.Linear(64, 5))


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 3, 24, 24), torch.randint(5, (16,))


def sequences() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 32, 16), torch.randint(5, (16, 32))


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    if name == "conv":
        return conv_net(), *images()
    return transformer(), *sequences()


def offered(model: nn.Module, x: Tensor, codecs: Any = "lossy") -> tuple[Capture, Instructions]:
    captured = capture(model, (x,), {})
    return captured, instructions_of(captured.graph, choose_codecs(codecs))


def all_encoded(
    captured: Capture, instructions: Instructions, codec: str, only: Container[str] | None = None
) -> list[str]:
    """The program with every activation (or only those so named) that `codec` offers encoded by it."""
    codes = {e.id for e in instructions.encoded if e.codec == codec}
    if only is not None:
        codes = {e for e in codes if captured.graph.storages[_of(instructions, e)].name in only}
    encodes = [i for i in instructions.items if i.kind == "encode" and codes & set(i.writes)]
    taken: dict[int, str] = {}
    for item in sorted(instructions.items, key=lambda item: len(codes & set(item.reads))):  # from all that it can
        made = codes.issuperset({e.id for e in instructions.encoded} & set(item.reads))
        if item.kind == "variant" and codes & set(item.reads) and made and item.op is not None:
            taken[item.op] = item.name
    steps = []
    for item in (instructions.items[i] for i in instructions.program):
        if item.kind == "turn":
            steps.extend(e.name for e in encodes)
        steps.append(taken.get(item.op, item.name) if item.op is not None else item.name)
    return steps


def _of(instructions: Instructions, encoded: int) -> int:
    return next(e.of for e in instructions.encoded if e.id == encoded)


def gradients(captured: Capture, instructions: Instructions, steps: list[str], model: nn.Module, x: Tensor) -> Any:
    """Run one step of a program and return its output and each parameter's gradient."""
    step = Step.of(captured, rewrite(captured.graph, instructions, steps))
    model.zero_grad()
    torch.manual_seed(3)
    y = step.run(lookup(model), [x])
    y.sin().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters()}
