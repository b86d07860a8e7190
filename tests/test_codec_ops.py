"""The functions as ops of torch.ops.graphplan: what their schemas and fake kernels say holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from graphplan import functions
from graphplan.capture import capture
from graphplan.codecs import choose_codecs
from graphplan.functions.register import name_of
from graphplan.instructions import instructions_of
from graphplan.rewrite import rewrite
from models_zoo import MODELS
from tests.test_codec_models import forced

aten = torch.ops.aten
POOLING = ((8, 6), (3, 3), (2, 2), (1, 1), (1, 1))


def _examples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, grad = torch.randn(2, 3, 8, 6).to(memory_format=torch.channels_last), torch.randn(2, 3, 8, 6)
    _, found = aten.max_pool2d_with_indices(x, *map(list, POOLING[1:]))
    like = (torch.float32, tuple(x.shape), tuple(x.stride()))
    bits = functions.pack_sides(x, ["above"], [0.0])
    threshold = aten.threshold_backward.default
    stride = threshold(grad, x, 0).stride()
    given = (bits, 0, [float("-inf"), float("nan")], *like, torch.float32, stride, grad, 0.0)
    codes = functions.pack_pool_indices(found, *POOLING)
    pooled = torch.randn(2, 3, 4, 3)
    return {
        "pack_sides": (functions.pack_sides, (x, ["above", "inside"], [0.0, -1.0, 1.0])),
        "unpack_bits": (functions.unpack_bits, (bits, like[1], like[2])),
        "pack_pool_indices": (functions.pack_pool_indices, (found, *POOLING)),
        "unpack_pool_indices": (functions.unpack_pool_indices, (codes, found.shape, found.stride(), *POOLING)),
        "narrow_integers": (functions.narrow_integers, (found, torch.uint8)),
        "widen_integers": (functions.widen_integers, (found.to(torch.uint8), torch.int64)),
        "dropout_backward": (functions.dropout_backward, (x, x > 0, 2.0)),
        "dropout_from_mask": (functions.dropout_from_mask, (x, x > 0, 0.5)),
        "from_sides": (functions.from_sides(threshold, 1), given),
        "from_sides, over": (functions.from_sides(threshold, 1, 0), given),
        "from_shape": (
            functions.from_shape(aten.avg_pool2d_backward.default, 1),
            (torch.empty(0), *like, True, pooled, [2, 2], [2, 2], [0, 0], False, True, None),
        ),
    }


@pytest.mark.parametrize("name", _examples())
def test_schemas_and_fakes(name: str) -> None:
    """Nothing is written that the schema does not say, and the fake kernel foretells shape, strides and dtype."""
    op, args = _examples()[name]
    opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_names() -> None:
    assert name_of(aten.ge.Scalar, "self", "from_sides") == "ge_Scalar_self_from_sides"
    form = functions.from_sides(aten.threshold_backward.default, 1)
    assert form is functions.from_sides(aten.threshold_backward.default, 1)
    assert form is torch.ops.graphplan.threshold_backward_self_from_sides.default
    assert functions.from_sides(aten.where.self, 0) is not functions.from_sides(aten.where.self, 1)


class _Compare(fx.Interpreter):
    """Runs a program and holds what its own ops make against what the captured graph says."""

    compared = 0

    def run_node(self, n: fx.Node) -> Any:
        made, said = super().run_node(n), n.meta.get("val")
        if isinstance(said, Tensor) and "graphplan" in str(n.target):
            assert (made.shape, made.stride(), made.dtype) == (said.shape, said.stride(), said.dtype), n
            self.compared += 1
        return made


@pytest.mark.parametrize("name", ["vgg16_bn", "unet", "mobilenet_v2", "gpt"])
def test_a_planned_program_runs_on_fakes(name: str) -> None:
    """Every node of it is an op with a fake kernel."""
    entry = MODELS[name]
    captured = capture(entry.build_small(), entry.example_small().inputs)
    instructions = instructions_of(captured.graph, choose_codecs("exact"))
    joint = rewrite(captured.graph, instructions, forced(instructions, captured)).joint
    run = _Compare(joint)
    with FakeTensorMode():
        given = [n.meta["val"] for n in joint.graph.find_nodes(op="placeholder")]
        run.run(*(torch.empty_strided(v.shape, v.stride(), dtype=v.dtype) for v in given))
    assert run.compared > 2
