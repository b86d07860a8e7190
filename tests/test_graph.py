"""Graph, rewrite and text forms on one small model that has all three fates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import graphplan
import solvers
from graphplan.capture import capture
from graphplan.codecs import choose_codecs
from graphplan.device import Device
from graphplan.errors import GraphplanError, PlanMismatch
from graphplan.graph import Graph, StorageKind
from graphplan.instructions import instructions_of
from graphplan.rewrite import rewrite


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        y = nn.functional.max_pool2d(y, 2)
        return self.head(self.drop(y.tanh().mean((2, 3))))


@pytest.fixture
def graph() -> Graph:
    return capture(Tiny(), (torch.randn(8, 3, 8, 8),)).graph


def test_text_form(graph: Graph, golden: Callable[[str, str], None]) -> None:
    golden("graph_tiny.txt", str(graph) + "\n")


def test_storages_not_tensors(graph: Graph) -> None:
    """A detached alias of relu is another name of relu's storage, not a second one."""
    names = {s.name: s for s in graph.storages}
    assert names["relu"].kind is StorageKind.ACTIVATION
    assert not any(name.startswith("detach") for name in names)
    assert names["p_conv_weight"].kind is StorageKind.PARAMETER
    assert names["b_norm_running_mean"].kind is StorageKind.BUFFER
    assert graph.fixed_bytes == sum(p.numel() * 4 for p in Tiny().parameters()) + (8 * 3 * 8 * 8 + 8) * 4 + 8


def test_networkx(graph: Graph) -> None:
    dag = graph.to_networkx()
    assert nx.is_directed_acyclic_graph(dag)
    assert dag.number_of_nodes() == len(graph.ops)
    by_name = {op.name: op.id for op in graph.ops}
    assert by_name["convolution"] in nx.ancestors(dag, by_name["convolution_backward"])


def test_verify_names_the_place(graph: Graph) -> None:
    graph.verify()
    first, second = graph.ops[0], graph.ops[1]
    wrong = replace(graph, ops=(replace(first, reads=(*first.reads, graph.ops[-1].writes[0])), *graph.ops[1:]))
    with pytest.raises(GraphplanError, match=r"op 0 '.*' reads storage \d+ before it is written"):
        wrong.verify()
    wrong = replace(graph, ops=(first, replace(second, writes=first.writes), *graph.ops[2:]))
    with pytest.raises(GraphplanError, match=r"op 1 '.*' writes storage \d+, which is already written"):
        wrong.verify()


def test_fingerprint_tells_graphs_apart() -> None:
    def of(model: nn.Module, *shape: int) -> str:
        return capture(model, (torch.randn(*shape),)).graph.fingerprint

    assert of(Tiny(), 8, 3, 8, 8) == of(Tiny(), 8, 3, 8, 8)
    assert of(Tiny(), 8, 3, 8, 8) != of(Tiny(), 9, 3, 8, 8)
    other = Tiny()
    other.drop.p = 0.25
    assert of(other, 8, 3, 8, 8) != of(Tiny(), 8, 3, 8, 8)


def test_what_may_run_twice(graph: Graph) -> None:
    by_target = {op.target: op for op in graph.ops if not op.backward}
    assert by_target["aten.convolution.default"].repeatable
    assert not by_target["aten.native_dropout.default"].repeatable
    assert by_target["aten.native_dropout.default"].random
    assert not by_target["aten._native_batch_norm_legit_functional.default"].repeatable


STEPS_OF_ALL_FATES = """
    add convolution _native_batch_norm_legit_functional relu max_pool2d_with_indices getitem_6__narrow relu__mask
    tanh mean native_dropout getitem_8__mask addmm copy_buffers turn
    mm mm_1 sum_1 getitem_8__unpack native_dropout_backward div convolution
    _native_batch_norm_legit_functional__pure relu getitem_6__widen tanh_backward
    max_pool2d_with_indices_backward threshold_backward__from_mask native_batch_norm_backward convolution_backward end
"""


def test_rewritten_code(graph: Graph, golden: Callable[[str, str], None]) -> None:
    """Recompute, encode and decode stand where the plan puts them, under names that say so."""
    instructions = instructions_of(graph, choose_codecs("exact"))
    offered = [i.name for i in instructions.items]
    assert set(STEPS_OF_ALL_FATES.split()) <= set(offered), sorted(set(STEPS_OF_ALL_FATES.split()) - set(offered))
    done = rewrite(graph, instructions, STEPS_OF_ALL_FATES.split())
    names = {n.name for n in done.joint.graph.nodes}
    assert {"convolution__recompute", "relu__recompute", "relu__mask", "getitem_8__mask"} <= names
    golden("rewrite_tiny.txt", done.joint.code + "\n# forward half" + done.forward.code + done.backward.code)


def test_rewrite_refuses_what_cannot_run(graph: Graph) -> None:
    instructions = instructions_of(graph, choose_codecs("exact"))
    steps = STEPS_OF_ALL_FATES.split()
    with pytest.raises(PlanMismatch, match="names op 'flux'"):
        rewrite(graph, instructions, ["flux", *steps])
    with pytest.raises(PlanMismatch, match=r"reads .* which is not live"):
        rewrite(graph, instructions, [s for s in steps if s != "tanh"])
    with pytest.raises(PlanMismatch, match="encoding that was not made"):
        rewrite(graph, instructions, [s for s in steps if s != "getitem_8__mask"])
    with pytest.raises(PlanMismatch, match="does not run"):
        rewrite(graph, instructions, steps[:-1])


def test_plan_text(golden: Callable[[str, str], None]) -> None:
    """The printed plan, without what a clock or a processor made: every op is estimated, and no scratch is known."""
    device = Device.this(torch.device("cpu"))
    planned = graphplan.optimize(Tiny(), "100%", (torch.randn(8, 3, 8, 8),), device=device)
    plan = replace(
        planned.plan,
        cost_ns=1_100_000,
        baseline_cost_ns=1_000_000,
        lower_bound_ns=1_050_000,
        bound_class=solvers.ANY_PLAN,  # which bound proves a plan follows from the ops' times
        any_bound_ns=1_040_000,
        torch_version="2.13.0",
    )
    golden("plan_tiny.txt", str(plan) + "\n")


def test_plan_diff() -> None:
    x = torch.randn(256, 8)
    model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 1))
    roomy = graphplan.optimize(model, "100%", (x,)).plan
    tight = graphplan.optimize(model, roomy.minimum_peak_bytes, (x,)).plan
    text = roomy.diff(tight)
    assert "keep" in text
    assert "->" in text
    assert roomy.diff(roomy).count("\n") == 2
