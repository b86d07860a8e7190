"""Problems as JSON: a round trip changes nothing, and nothing malformed gets in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings

from solvers import MalformedProblem, Problem
from tests.solvers.problems import problems, random_problem


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(12))
def test_round_trip(problem: Problem) -> None:
    text = problem.to_json()
    assert Problem.from_json(text) == problem
    assert Problem.from_json(text).to_json() == text


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated(share: float) -> None:
    text = random_problem(1, 5).to_json().rstrip()
    with pytest.raises(MalformedProblem):
        Problem.from_json(text[: int(len(text) * share)])


def changed(**fields: Any) -> str:
    data = json.loads(random_problem(1, 5).to_json())
    return json.dumps({**data, **fields})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (changed(format="graphplan-problem-99"), "expected format"),
        ("[]", "expected format"),
        (changed(turn=10_000), "turn"),
        (changed(keep=[10_000]), "keep"),
        (changed(program=[0, 0]), "permutation"),
        (changed(fixed_bytes=-1), "negative"),
        (changed(ops=[{"name": "x"}]), "field"),
        (changed(value_bytes=[1]), "value names"),
    ],
)
def test_malformed(text: str, words: str) -> None:
    with pytest.raises(MalformedProblem, match=words):
        Problem.from_json(text)


def op_changed(index: int, **fields: Any) -> str:
    data = json.loads(random_problem(1, 5).to_json())
    data["ops"][index].update(fields)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (op_changed(0, reads=[10_000]), "op 0 .* unknown value 10000"),
        (op_changed(0, writes=[-1]), "op 0 .* unknown value -1"),
        (op_changed(0, cost_ns=-5), "op 0 .* negative"),
        (op_changed(1, instead_of=10_000), "stands for unknown op"),
        (op_changed(0, kind="magic"), "field"),
        (op_changed(0, reads=[1]), "before it is written"),
        (op_changed(1, writes=[0]), "another program op writes|before it is written"),
        (op_changed(0, takes_over=0), "op 0 .* takes over value 0, but does not read it"),
    ],
)
def test_malformed_ops(text: str, words: str) -> None:
    with pytest.raises(MalformedProblem, match=words):
        Problem.from_json(text)


def test_an_optional_op_that_must_run_once_is_refused() -> None:
    """No schedule may run it, and solvers took it for one that may run again (a dropout's variant)."""
    data = json.loads(random_problem(1, 5).to_json())
    first = data["program"][0]
    data["ops"].append({**data["ops"][first], "name": "twin", "instead_of": first, "repeatable": True})
    Problem.from_json(json.dumps(data))
    data["ops"][-1]["repeatable"] = False
    with pytest.raises(MalformedProblem, match="'twin' is optional"):
        Problem.from_json(json.dumps(data))
