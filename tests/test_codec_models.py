"""Every codec in a training step of a tiny model: gradients equal to the bit, and a wrong bit is seen."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import graphplan
from graphplan import functions
from graphplan.capture import Capture, capture
from graphplan.codecs import CODECS, choose_codecs
from graphplan.graph import Graph
from graphplan.instructions import Instruction, Instructions, instructions_of
from graphplan.profile import Profile, profile
from graphplan.rewrite import rewrite
from graphplan.runtime import Step
from graphplan.state import lookup
from models_zoo import MODELS


class Net(nn.Module):
    """Two convolutions (or linear layers) with `middle` between them."""

    def __init__(self, middle: Callable[[Tensor], Tensor], *, linear: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.middle = middle
        self.first = nn.Linear(16, 24) if linear else nn.Conv2d(3, 5, 3, padding=1)
        self.last = nn.Linear(24, 4) if linear else nn.Conv2d(5, 4, 3, padding=1)
        if frozen:
            self.last.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


@dataclass(frozen=True)
class Case:
    """A model, and the instructions that the codecs must offer for it."""

    middle: Callable[[Tensor], Tensor]
    offers: tuple[str, ...]
    linear: bool = False
    frozen: bool = False

    def model(self) -> Net:
        torch.manual_seed(0)
        return Net(self.middle, linear=self.linear, frozen=self.frozen)

    def inputs(self) -> Tensor:
        return torch.randn(33, 16) if self.linear else torch.randn(3, 3, 10, 9)


def pooled_relu(x: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(x), 3, 2, 1)


class Embedded(nn.Module):
    """Adds rows of a table; the lookup itself, and nothing before it, proves where its indices lie."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 24)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[:, :2].detach() * 100).long() % 300
        return x + self.table(ids).sum(1)


class Drifting(nn.Module):
    """A clipped sum with a buffer that every step changes: the sum cannot run again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("drift", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(x + self.drift)
        self.drift.add_(0.1)
        return y


CASES = {
    "relu": Case(F.relu, ("relu__mask", "threshold_backward__from_mask"), linear=True),
    "relu6": Case(F.relu6, ("hardtanh__mask", "hardtanh_backward__from_mask"), linear=True),
    "relu6 of images": Case(F.relu6, ("hardtanh__mask", "hardtanh_backward__from_mask")),
    "relu6 of what runs once": Case(Drifting(), ("hardtanh__mask", "hardtanh_backward__from_mask"), linear=True),
    "hardtanh": Case(
        lambda x: F.hardtanh(x, -0.2, 0.3), ("hardtanh__mask", "hardtanh_backward__from_mask"), linear=True
    ),
    "clamp": Case(lambda x: x.clamp(-0.5, 0.4), ("addmm__mask", "ge__from_mask", "le__from_mask"), linear=True),
    "clamp at one end": Case(lambda x: x.clamp_min(0.1), ("addmm__mask", "ge__from_mask"), linear=True),
    "leaky_relu": Case(
        lambda x: F.leaky_relu(x, 0.1), ("leaky_relu__mask", "leaky_relu_backward__from_mask"), linear=True
    ),
    "leaky_relu in place": Case(lambda x: F.leaky_relu(x, 0.1, inplace=True), ("leaky_relu__mask",), linear=True),
    "hardsigmoid": Case(F.hardsigmoid, ("addmm__mask", "hardsigmoid_backward__from_mask"), linear=True),
    "dropout": Case(
        lambda x: F.dropout(x, 0.3), ("getitem_1__unpack", "native_dropout_backward__from_mask"), linear=True
    ),
    "where": Case(lambda x: torch.where(x > 0.1, x, 0.2 * x), ("gt__mask", "where_1__from_mask"), linear=True),
    "masked_fill": Case(lambda x: x.masked_fill(x < 0, -1.0), ("lt__mask", "masked_fill_1__from_mask"), linear=True),
    "hardshrink": Case(F.hardshrink, ("le__mask",), linear=True),
    "max_pool": Case(
        pooled_relu,
        ("getitem_1__narrow", "relu__mask", "max_pool2d_with_indices_backward__from_shape"),
    ),
    "max_pool, dilated": Case(lambda x: F.max_pool2d(x, (2, 3), 1, 1, (1, 2)), ("getitem_1__narrow",)),
    "adaptive_max_pool": Case(lambda x: F.adaptive_max_pool2d(x, 4), ("getitem_1__narrow", "convolution__shape")),
    "avg_pool": Case(lambda x: F.avg_pool2d(x.tanh(), 3, 1, 1), ("avg_pool2d_backward__from_shape",)),
    "adaptive_avg_pool": Case(lambda x: F.adaptive_avg_pool2d(x.tanh(), 4), ("tanh__shape",)),
    "reflection": Case(lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), ("convolution__shape",)),
    "frozen convolution": Case(lambda x: x * 2, ("mul__shape", "convolution_backward__from_shape"), frozen=True),
    "argmax": Case(lambda x: x * x.gather(1, x.argmax(1, True)), ("argmax__narrow",), linear=True),
    "embedding": Case(Embedded(), ("remainder__narrow",), linear=True),
    "topk": Case(lambda x: x * x.topk(3, 1)[0].sum(1, keepdim=True), ("getitem_1__narrow",), linear=True),
}


def forced(instructions: Instructions, capture: Capture, only: str | None = None) -> list[str]:
    """Return the program with every codec in force: encodes before the turn, alternatives and decodes after it.

    `only` keeps the codecs to encodings of that codec.
    """
    items = instructions.items
    of = {e.id: e for e in instructions.encoded if only in (None, e.codec)}
    encodes = [i for i in items if i.kind == "encode" and set(i.writes) & of.keys()]
    instead = {capture.graph.ops[i.op].name: i for i in items if i.op is not None and set(i.reads) & of.keys()}
    decodes = {i.writes[0]: i for i in items if i.kind == "decode" and set(i.reads) & of.keys()}
    steps: list[str] = []
    turned = False
    for item in (items[p] for p in instructions.program):
        if item.kind == "turn":
            steps.extend(e.name for e in encodes)
            turned = True
        chosen: Instruction = instead.get(item.name, item) if turned else item
        for s in chosen.reads if turned else ():
            if s in decodes:
                steps.append(decodes.pop(s).name)
        steps.append(chosen.name)
    return steps


def gradients(captured: Capture, instructions: Instructions, steps: list[str], model: nn.Module, x: Tensor) -> Any:
    """Run one training step of the program and return its loss, its gradients and the input's."""
    step = Step.of(captured, rewrite(captured.graph, instructions, steps))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.zero_grad()
    x = x.detach().requires_grad_(True)
    torch.manual_seed(3)
    loss = step.run(lookup(model), [x]).sin().sum()
    loss.backward()
    model.load_state_dict(before)
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters())]


def prepared(case: Case) -> tuple[Net, Tensor, Capture, Instructions]:
    model, x = case.model(), case.inputs().requires_grad_(True)
    captured = capture(model, (x,), {})
    return model, x, captured, instructions_of(captured.graph, choose_codecs("exact"))


def equal(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all((x is y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_plain_graph(name: str) -> None:
    """All codecs at once, and each alone."""
    case = CASES[name]
    model, x, captured, instructions = prepared(case)
    offered = {i.name for i in instructions.items}
    assert set(case.offers) <= offered, sorted(i for i in offered if "__" in i)
    plain = gradients(captured, instructions, [instructions.items[p].name for p in instructions.program], model, x)
    for only in (None, *CODECS):
        steps = forced(instructions, captured, only)
        assert equal(plain, gradients(captured, instructions, steps, model, x)), only
        assert only is not None or set(case.offers) & set(steps)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channels_last": {"memory_format": torch.channels_last},
    "bfloat16": {"dtype": torch.bfloat16},
}
IMAGES = [
    pytest.param(name, form, marks=() if name == "resnet18" else pytest.mark.slow)
    for name in ("resnet18", "vgg16_bn", "unet", "mobilenet_v2")
    for form in list(FORMS)[1:]
]


@pytest.mark.parametrize(("name", "form"), [*((name, "plain") for name in MODELS), *IMAGES])
def test_zoo_models_with_every_codec_in_force(name: str, form: str) -> None:
    """Outputs, gradients and buffers of a whole step, to the bit."""
    entry = MODELS[name]
    model, example = entry.build_small().to(**FORMS[form]), entry.example_small()
    inputs = tree_map_only(Tensor, lambda x: x.to(**FORMS[form]), example.inputs)
    captured = capture(model, inputs, {})
    instructions = instructions_of(captured.graph, choose_codecs("exact"))
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def step_of(steps: list[str]) -> list[Tensor | None]:
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(3)
        step = Step.of(captured, rewrite(captured.graph, instructions, steps))
        outputs = step.run(lookup(model), [x for x in tree_leaves(inputs) if isinstance(x, Tensor)])
        entry.loss(outputs, example.targets).backward()
        buffers = [b.clone() for b in model.buffers()]
        return [*(t.detach() for t in tree_leaves(outputs)), *(p.grad for p in model.parameters()), *buffers]

    steps = forced(instructions, captured)
    assert any(s.endswith(("__mask", "__shape", "__narrow")) for s in steps) == (name not in ("vit", "lstm"))
    assert equal(step_of([instructions.items[p].name for p in instructions.program]), step_of(steps))


@pytest.mark.parametrize("name", ["relu", "relu6 of images", "dropout", "where", "max_pool", "topk", "embedding"])
def test_a_wrong_bit_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients do depend on what was packed: this is what the tests above compare."""
    model, x, captured, sound = prepared(CASES[name])
    plain = gradients(captured, sound, [sound.items[p].name for p in sound.program], model, x)
    for function in ("pack_sides", "pack_pool_indices", "narrow_integers"):
        packs = getattr(functions, function)

        def wrong(*args: Any, packs: Callable[..., Tensor] = packs) -> Tensor:
            packed = packs(*args)
            return packed ^ 1  # the first of each byte's bits, the lowest of each index

        monkeypatch.setattr(functions, function, wrong)
    instructions = instructions_of(captured.graph, choose_codecs("exact"))
    for codec in {e.codec for e in instructions.encoded}:
        steps = forced(instructions, captured, codec)
        if any("__from_mask" in s or "__unpack" in s or "__widen" in s for s in steps):
            assert not equal(plain, gradients(captured, instructions, steps, model, x)), codec


@pytest.mark.parametrize("name", ["relu6 of what runs once", pytest.param("dropout", marks=pytest.mark.slow)])
def test_a_tight_budget_brings_codecs(name: str) -> None:
    """The solver chooses them by itself; `verify` measures the peak and compares every bit with the plain graph."""
    case = CASES[name]

    def deep() -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = [case.model()]
        for _ in range(4):  # with two, masks are so few that a second recompute is worth as much
            layers += [nn.Linear(4, 16) if case.linear else nn.Conv2d(4, 3, 3, padding=1), case.model()]
        return nn.Sequential(*layers)

    x = torch.randn(512, 16) if case.linear else torch.randn(16, 3, 32, 32)
    # Times by bytes, so that no load moves the plan.
    device = graphplan.optimize(deep(), "100%", (x,), time_limit=6).device_profile
    device.samples.update({k: replace(s, cost_ns=20_000 + s.touched_bytes) for k, s in device.samples.items()})
    free, without = (
        graphplan.optimize(deep(), "100%", (x,), time_limit=10, device=device, codecs=codecs)
        for codecs in ("exact", "none")
    )
    assert free.plan.minimum_peak_bytes <= without.plan.minimum_peak_bytes
    model = deep()
    planned = graphplan.optimize(model, free.plan.minimum_peak_bytes, (x,), time_limit=10, device=device)
    graphplan.verify(planned, model, (x,))
    assert {d.codec for d in planned.plan.decisions.values()} & set(CODECS), planned.plan


def test_where_everything_fits_everything_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast the alternatives that read a code were in one measurement of this machine."""
    module = importlib.import_module("graphplan.optimize")

    def lucky(graph: Graph, instructions: Instructions, *args: Any, **more: Any) -> Profile:
        codes = {e.id for e in instructions.encoded}
        costs = tuple(0 if {*i.reads, *i.writes} & codes else 1_000_000 for i in instructions.items)
        return replace(profile(graph, instructions, *args, **more), cost_ns=costs)

    monkeypatch.setattr(module, "profile", lucky)
    model = nn.Sequential(Net(F.relu), nn.Conv2d(4, 3, 3, padding=1), Net(F.relu))
    plan = graphplan.optimize(model, "100%", (torch.randn(8, 3, 32, 32),), time_limit=6).plan
    assert {d.fate for d in plan.decisions.values()} == {"keep"}


def test_what_an_upcast_widened_stays_narrow() -> None:
    """No codec is needed: the float32 copy of a bfloat16 is made again from the source, which is kept."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                with torch.autocast("cpu", torch.bfloat16):
                    x = layer(x)
                x = F.gelu(x.float())
            return x

    torch.manual_seed(0)
    x, model = torch.randn(2048, 64), Mixed()
    free = graphplan.optimize(model, "100%", (x,), time_limit=6).plan
    budget = (3 * free.baseline_peak_bytes + 2 * free.minimum_peak_bytes) // 5
    planned = graphplan.optimize(model, budget, (x,), time_limit=6)
    graphplan.verify(planned, model, (x,))
    steps = planned.plan.steps
    again = {s for s in steps if steps.count(s) > 1}
    assert sum(s.startswith("_to_copy") for s in again) >= 2, again  # of four; which else depends on measured times
