"""Imports run one way, and files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # package -> top-level packages of this project that it may import
    "solvers": {"solvers"},
    "models_zoo": {"models_zoo"},
    "graphplan": {"graphplan", "solvers"},
}
LAZY = {"graphplan/cli": {"models_zoo"}}  # named by the user on the command line, imported only then


def files(package: str) -> Iterator[Path]:
    return (ROOT / package).rglob("*.py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    ours = {*ALLOWED, "bench", "tests"}
    for path in files(package):
        extra = next((v for k, v in LAZY.items() if str(path.relative_to(ROOT)).startswith(k)), set())
        bad = {m.split(".")[0] for m in imports(path)} & ours - ALLOWED[package] - extra
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def test_only_the_federated_side_imports_flower() -> None:
    for package in ALLOWED:
        for path in files(package):
            if "federated" not in path.parts:
                assert not any(m.split(".")[0] == "flwr" for m in imports(path)), path


def test_everything_but_the_federated_side_works_without_flower() -> None:
    code = (
        "import sys; sys.modules['flwr'] = None\n"
        "import graphplan, graphplan.cli.fl_commands\n"
        "try:\n    import graphplan.federated\n"
        "except ModuleNotFoundError as e:\n    assert \"pip install 'graphplan[federated]'\" in str(e), e\n"
        "else:\n    raise AssertionError('it has found Flower')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_core_does_not_import_its_doors() -> None:
    for path in files("graphplan"):
        if not {"cli", "federated"} & set(path.parts):
            assert not any(m.startswith(("graphplan.cli", "graphplan.federated")) for m in imports(path)), path


def test_solvers_need_no_torch() -> None:
    code = "import sys, solvers; assert not {'torch', 'graphplan'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_pickle_anywhere() -> None:
    for package in ALLOWED:
        for path in files(package):
            assert not {"pickle", "dill", "cloudpickle"} & imports(path), path
            assert "torch.load" not in path.read_text(), path


@pytest.mark.parametrize("package", [*ALLOWED, "bench", "tests"])
def test_sizes(package: str) -> None:
    for path in files(package):
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"
