"""The door: what `solvers` exports, and what it must not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import solvers
from tests.solvers.problems import random_problem


def test_imports_neither_torch_nor_graphplan() -> None:
    code = "import sys, solvers; sys.exit(bool({'torch', 'graphplan'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_solver_is_described() -> None:
    assert solvers.SOLVERS.keys() == solvers.DESCRIPTIONS.keys()


def test_an_unknown_solver_is_named() -> None:
    with pytest.raises(KeyError, match="no solver 'magic'"):
        solvers.solve(random_problem(1, 3), "magic")


def test_the_working_set_adds_up() -> None:
    for seed in range(50):
        w = solvers.working_set(random_problem(seed, 8))
        parts = (w.fixed_bytes, w.keep_bytes, w.read_bytes, w.write_bytes, w.workspace_bytes, w.other_bytes)
        assert sum(parts) == w.peak_bytes
        assert min(parts) >= 0
