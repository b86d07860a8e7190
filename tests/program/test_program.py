"""Programs: a planned step as JSON trains to the same bits; hostile documents are refused before anything is built."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphplan
from graphplan.capture import flatten_call
from graphplan.program import ProgramError, read_program, write_program
from graphplan.program.ops import base_ops, name_of_target, target_named, targets
from graphplan.step.train import TrainStep, call_arguments
from models_zoo import MODELS

Document = dict[str, Any]
ROOM = 1 << 24


def _step(model: nn.Module, loss: Any, inputs: Any, labels: Any, share: float = 1.05) -> TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphplan.train_step(model, loss, optimizer, "100%", inputs, labels, time_limit=1)
    step = step.at_budget(int(step.plan.minimum_peak_bytes * share))
    step.prepare(inputs, labels)
    return step


def _text(step: TrainStep, inputs: Any, labels: Any) -> str:
    tensors = [t.detach() for t in flatten_call(*call_arguments(inputs, labels))[1]]
    return write_program(step.model, step.entry().step, step.plan, tensors)


@pytest.mark.parametrize("name", ["mobilenet_v2", "unet", "gpt"])
def test_a_program_trains_to_the_same_bits_without_the_models_source(name: str) -> None:
    entry = MODELS[name]
    torch.manual_seed(0)
    model, example = entry.build_small(), entry.example_small()
    weights = copy.deepcopy(model.state_dict())
    step = _step(model, entry.loss, example.inputs, example.targets)
    text = _text(step, example.inputs, example.targets)
    program = read_program(text, step.plan.budget_bytes)
    held = program.make_model()
    held.load_state_dict(weights)
    loaded = program.bind(held, torch.optim.SGD(held.parameters(), lr=0.1))
    for seed in range(3):
        torch.manual_seed(seed)
        ours = step(example.inputs, example.targets)
        torch.manual_seed(seed)
        assert torch.equal(loaded(example.inputs, example.targets), ours)
    assert list(held.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(held.state_dict().values(), model.state_dict().values(), strict=True))
    measured = graphplan.measure(loaded, example.inputs, example_targets=example.targets, runs=1)
    assert measured.peak_bytes <= step.plan.budget_bytes
    assert program.floor_bytes <= program.peak_bytes == step.plan.peak_bytes
    assert len(text) < 100_000


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        out: Tensor = self.head(x.flatten(1))
        return out


BATCH = (torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))


@pytest.fixture(scope="module")
def document() -> Document:
    torch.manual_seed(0)
    step = _step(_Small(), F.cross_entropy, BATCH[0], BATCH[1], 2.0)
    found: Document = json.loads(_text(step, *BATCH))
    return found


def _call(document: Document, name: str) -> list[Any]:
    call: list[Any] = next(c for c in document["calls"] if c[0].startswith(name))
    return call


def _changed(document: Document, change: Callable[[Document], Any]) -> str:
    copied = copy.deepcopy(document)
    change(copied)
    return json.dumps(copied)


def _set(name: str, place: int, value: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        _call(document, name)[1][place] = value

    return change


def _rename(name: str, to: Any) -> Callable[[Document], None]:
    def change(document: Document) -> None:
        _call(document, name)[0] = to

    return change


HOSTILE: dict[str, tuple[Callable[[Document], Any], str]] = {
    "an op outside the list": (_rename("aten.convolution.", "aten.from_file.default"), "list of ops"),
    "a Python function": (_rename("aten.convolution.", "os.system"), "list of ops"),
    "a method by a long way": (_rename("getitem", "getitem.__globals__"), "list of ops"),
    "a form of an op that has none": (
        _rename("aten.convolution.", "graphplan.convolution_bias_from_sides.over_weight"),
        "list of ops",
    ),
    "a reference forward": (_set("aten.convolution.", 0, {"%": 10_000}), "not made yet"),
    "a cycle": (lambda d: d["calls"][0][1].__setitem__(0, {"%": len(d["inputs"])}), "not made yet"),
    "a negative reference": (_set("aten.convolution.", 0, {"%": -1}), "not made yet"),
    "too few arguments": (lambda d: _call(d, "aten.convolution.")[1].pop(), "lacks groups"),
    "too many arguments": (lambda d: _call(d, "aten.convolution.")[1].append(0), "it takes 9"),
    "an unknown keyword": (lambda d: _call(d, "aten.convolution.").append({"out": 1}), "keywords"),
    "a tensor for a number": (_set("aten.convolution.", 8, {"%": 0}), "cannot run"),
    "a huge input": (
        lambda d: next(r for r in d["inputs"] if r[0] == "input")[3].__setitem__(0, 1 << 39),
        "bytes",
    ),
    "a huge parameter": (lambda d: d["tensors"][0]["geometry"][1].__setitem__(0, 1 << 39), "bytes"),
    "a huge stride": (lambda d: d["tensors"][0]["geometry"][2].__setitem__(0, 1 << 39), "bytes"),
    "a negative size": (lambda d: d["tensors"][0]["geometry"][1].__setitem__(0, -1), "no sizes"),
    "a number beyond int64": (_set("aten.convolution.", 8, 1 << 70), "int64"),
    "a path of the module itself": (
        lambda d: d["tensors"].append({"path": "forward", "kind": "buffer", "geometry": ["float32", [1], [1]]}),
        "name",
    ),
    "a path that is code": (lambda d: d["tensors"][0].update(path="x=1;import os"), "no parameter's path"),
    "statistics that are too short": (
        lambda d: d["calls"].extend(
            [
                ["aten.ones.default", [[8, 100, 2, 2]]],
                ["aten.ones.default", [[1]]],
                [
                    "aten.native_batch_norm_backward.default",
                    [*[{"%": len(d["inputs"]) + len(d["calls"])}] * 2, None, None, None]
                    + [{"%": len(d["inputs"]) + len(d["calls"]) + 1}] * 2
                    + [True, 1e-5, [True, True, True]],
                ],
            ]
        ),
        "do not belong together",
    ),
    "statistics that are too short for a sliced op": (
        lambda d: d["calls"].extend(
            [
                ["aten.ones.default", [[8, 100, 2, 2]]],
                ["aten.ones.default", [[100]]],
                ["aten.ones.default", [[1]]],
                [
                    "batch_norm_backward",
                    [*[{"%": len(d["inputs"]) + len(d["calls"])}] * 2, {"%": len(d["inputs"]) + len(d["calls"]) + 1}]
                    + [{"%": len(d["inputs"]) + len(d["calls"]) + 2}] * 2
                    + [1e-5],
                ],
            ]
        ),
        "belong to another input",
    ),
    "another result": (lambda d: d["results"].append(0), "nothing else"),
    "a loss that is a batch": (lambda d: d.update(loss=0, results=[0]), "loss"),
    "another update": (lambda d: d.update(update="exec"), "no update"),
    "another version": (lambda d: d.update(version=99), "version"),
    "a field too many": (lambda d: d.update(code="x"), "fields"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_documents_are_refused(what: str, document: Document) -> None:
    change, said = HOSTILE[what]
    text = _changed(document, change)
    with pytest.raises(ProgramError, match=said):
        read_program(text, ROOM).make_model()


def _pool(made: Callable[[int], list[list[Any]]]) -> Callable[[Document], None]:
    """Put calls before the pooling's backward whose last result are its indices; what is behind moves."""

    def change(document: Document) -> None:
        calls, inputs = document["calls"], len(document["inputs"])
        place = next(i for i, c in enumerate(calls) if "max_pool2d_with_indices_backward" in c[0])
        new = made(calls[place][1][-1]["%"])
        for c in calls[place:]:
            _move(c[1:], place + inputs, len(new))
        for key in ("loss",):
            document[key] += len(new) * (document[key] >= place + inputs)
        document["results"] = [document["loss"]]
        for i, c in enumerate(new):
            calls.insert(place + i, json.loads(json.dumps(c).replace('"last"', str(inputs + place + i - 1))))
        calls[place + len(new)][1][-1] = {"%": inputs + place + len(new) - 1}

    return change


def _move(value: Any, from_: int, by: int) -> None:
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, dict) and "%" in item:
            item["%"] += by * (item["%"] >= from_)
        elif isinstance(item, list | dict):
            _move(item, from_, by)


@pytest.mark.parametrize(
    "made",
    [
        lambda i: [["aten.full.default", [[8, 4, 4, 4], 10**9], {"dtype": {"dtype": "int64"}}]],
        lambda i: [["aten.add.Scalar", [{"%": i}, 10**9]]],
        lambda i: [["aten.flip.default", [{"%": i}, [3]]]],
        lambda i: [
            ["graphplan.narrow_integers.default", [{"%": i}, {"dtype": "int8"}]],
            ["graphplan.widen_integers.default", [{"%": "last"}, {"dtype": "int64"}]],
            ["aten.mul.Scalar", [{"%": "last"}, 1 << 40]],
        ],
    ],
)
def test_max_poolings_backward_takes_no_other_indices(
    made: Callable[[int], list[list[Any]]], document: Document
) -> None:
    """Its kernel writes where they say, whatever they say."""
    with pytest.raises(ProgramError, match=r"indices|belong"):
        read_program(_changed(document, _pool(made)), ROOM)


def test_indices_of_the_same_pooling_are_taken(document: Document) -> None:
    same = _pool(
        lambda i: [
            ["graphplan.narrow_integers.default", [{"%": i}, {"dtype": "int8"}]],
            ["graphplan.widen_integers.default", [{"%": "last"}, {"dtype": "int64"}]],
        ]
    )
    read_program(_changed(document, same), ROOM)


def _by_shape(rows: int) -> Callable[[Document], None]:
    """Let the loss's backward read only the shape of the log-probabilities, as plans that drop them do."""

    def change(document: Document) -> None:
        call = _call(document, "aten.nll_loss_backward.")
        grad, _, target, *others = call[1]
        call[0] = "graphplan.nll_loss_backward_self_from_shape.default"
        call[1] = [target, {"dtype": "float32"}, [rows, 10], [10, 1], True, grad, target, *others]

    return change


def test_a_backward_that_reads_a_shape_is_held_against_it(document: Document) -> None:
    read_program(_changed(document, _by_shape(8)), ROOM).make_model()
    with pytest.raises(ProgramError, match="do not belong together"):
        read_program(_changed(document, _by_shape(4)), ROOM).make_model()


def test_a_model_that_is_a_sequence_is_a_program() -> None:
    model, loss = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), nn.functional.cross_entropy
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    program = read_program(_text(_step(model, loss, x, y), x, y), ROOM)
    assert list(program.make_model().state_dict()) == list(model.state_dict())


@pytest.fixture(scope="module")
def chunked() -> tuple[Document, TrainStep, Tensor, Tensor]:
    """A step whose loss is computed in chunks of rows, for a budget that nothing else fits, and its document."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4000))
    x, y, optimizer = torch.randn(256, 32), torch.arange(256), torch.optim.SGD(model.parameters(), lr=0.1)
    step = graphplan.train_step(model, F.cross_entropy, optimizer, "100%", x, y)
    step = step.at_budget(step.least_peaks(x, y)[1])
    step.prepare(x, y)
    return json.loads(_text(step, x, y)), step, x, y


def test_a_loss_in_chunks_is_a_program(chunked: tuple[Document, TrainStep, Tensor, Tensor]) -> None:
    document, step, x, y = chunked
    assert any(c[0] == "linear_cross_entropy" for c in document["calls"])
    program = read_program(json.dumps(document), step.plan.budget_bytes)
    held = program.make_model()
    held.load_state_dict(step.model.state_dict())
    loaded = program.bind(held, torch.optim.SGD(held.parameters(), lr=0.1))
    for _ in range(3):
        assert torch.equal(loaded(x, y), step(x, y))
    measured = graphplan.measure(loaded, x, example_targets=y, runs=1)
    assert measured.peak_bytes <= step.plan.budget_bytes


@pytest.mark.parametrize(("place", "value"), [(4, 0), (4, 3), (3, {"%": 0}), (0, {"%": 1}), (6, None), (2, {"%": 0})])
def test_a_loss_in_chunks_takes_nothing_else(
    place: int, value: Any, chunked: tuple[Document, TrainStep, Tensor, Tensor]
) -> None:
    def change(document: Document) -> None:
        _call(document, "linear_cross_entropy")[1][place] = value

    with pytest.raises(ProgramError, match="cannot run"):
        read_program(_changed(chunked[0], change), ROOM)


def test_indices_are_not_written_over(document: Document) -> None:
    def change(d: Document) -> None:
        place = next(i for i, c in enumerate(d["calls"]) if "max_pool2d_with_indices_backward" in c[0])
        indices = d["calls"][place][1][-1]["%"]
        d["calls"].append(["aten.add_.Tensor", [{"%": indices}, {"%": indices}]])

    with pytest.raises(ProgramError, match="writes over integers"):
        read_program(_changed(document, change), ROOM)


def test_a_program_above_the_clients_memory_is_refused(document: Document) -> None:
    floor = read_program(json.dumps(document), ROOM).floor_bytes
    read_program(json.dumps(document), floor)
    with pytest.raises(ProgramError, match="are allowed"):
        read_program(json.dumps(document), floor - 1)


def test_cut_off_and_deep_texts_are_refused(document: Document) -> None:
    text = json.dumps(document)
    for bad in (text[:-9], "", "[]", "[" * 200_000, '{"format": "graphplan-program"}', "\x80\x04K\x01."):
        with pytest.raises(ProgramError):
            read_program(bad, ROOM)


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 66), 1 << 66), st.integers(-3, 60), st.floats(), st.text(max_size=8),
    st.lists(st.integers(-2, 70), max_size=5), st.builds(lambda i: {"%": i}, st.integers(-1, 90)),
    st.sampled_from(sorted(targets())),
    # Copies: a change inside one would be there in the next example, once even itself inside itself.
    st.sampled_from([{"dtype": "int8"}, {"dtype": "pickle"}, {"float": "nan"}, {}]).map(copy.deepcopy),
)  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_refused_or_makes_another_program(data: st.DataObject, document: Document) -> None:
    copied = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        places = list(_places(copied))
        owner, key = places[data.draw(st.integers(0, len(places) - 1))]
        owner[key] = data.draw(_VALUES)
    try:
        program = read_program(json.dumps(copied), ROOM)
        program.make_model()
    except ProgramError:
        return
    assert program.floor_bytes <= ROOM


def test_batches_of_another_geometry_and_other_optimizers_are_refused(document: Document) -> None:
    program = read_program(json.dumps(document), ROOM)
    model = program.make_model()
    with pytest.raises(ProgramError, match="updates by sgd"):
        program.bind(model, torch.optim.Adam(model.parameters()))
    step = program.bind(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ProgramError, match="tensor 0"):
        step(BATCH[0][:4], BATCH[1][:4])
    with pytest.raises(ProgramError, match="2 tensors"):
        step(BATCH[0])
    with pytest.raises(ProgramError, match="no such"):
        program.bind(nn.Linear(2, 2), torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_list_has_no_op_that_leaves_the_process() -> None:
    assert all(name_of_target(t) == n for n, t in targets().items())
    assert target_named("aten.set_.source_Storage") is None
    for op in base_ops().values():
        assert torch.Tag.nondeterministic_seeded not in op.tags or "dropout" in str(op) or "attention" in str(op), op
        types = {str(a.type) for a in op._schema.arguments}
        assert not types & {"Storage", "Generator", "Stream"}, op
