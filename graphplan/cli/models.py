"""Naming a model: `models_zoo:resnet18`, `package.module:factory` or `file.py:factory`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from graphplan.cli.output import BadInput

ZOO = "models_zoo"
FORMS = "name it models_zoo:resnet18, package.module:factory or file.py:factory"

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=FORMS + ".")]
Size = Annotated[str, typer.Option(help='"real" or "small": which size of a models_zoo model.')]
Batch = Annotated[int | None, typer.Option(min=1, help="Batch size of a models_zoo model.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", help='One example input of a factory\'s module, e.g. "4,3,32,32" or "8,128:int64"; repeat.'
    ),
]


@dataclass(frozen=True, slots=True)
class Named:
    """A model by its name, with one training batch."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    loss_fn: Callable[..., Tensor] | None = None
    targets: Any = None


def resolve(
    name: str, size: str = "real", batch: int | None = None, inputs: Sequence[str] | None = None, seed: int = 0
) -> Named:
    """Return the model that `name` names, in training mode, built with a fixed `seed`.

    Raises:
        BadInput: what is wrong with the name or with what the factory gave, in one line.
    """
    place, colon, factory = name.rpartition(":")
    if not colon or not place or not factory:
        known = f"; did you mean {ZOO}:{name}?" if name in _zoo_names() else ""
        raise BadInput(f"model {name!r}: {FORMS}{known}")
    if size not in ("real", "small"):
        raise BadInput(f'--size {size!r}: choose "real" or "small"')
    torch.manual_seed(seed)
    if place == ZOO:
        return _from_zoo(name, factory, size, batch)
    if batch is not None or size != "real":
        raise BadInput(f"--batch and --size are for {ZOO} models; give {name!r} its shapes with --input")
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the answer
        return _from_factory(name, _import(place), factory, inputs or ())


def zoo() -> Mapping[str, Any]:
    """Return the table of models_zoo, imported here and not before.

    Raises:
        BadInput: the package is not installed.
    """
    try:
        return dict(importlib.import_module(ZOO).MODELS)
    except ModuleNotFoundError as e:
        raise BadInput(f"the package {ZOO} is not installed beside graphplan ({e})") from e


def _zoo_names() -> list[str]:
    return list(zoo()) if importlib.util.find_spec(ZOO) else []


def _from_zoo(name: str, key: str, size: str, batch: int | None) -> Named:
    table = zoo()
    if key not in table:
        raise BadInput(f"no model {name!r}{_suggest(key, table)}; models_zoo has {', '.join(table)}")
    entry = table[key]
    small = size == "small"
    module = (entry.build_small if small else entry.build)()
    example = (entry.example_small if small else entry.example)(batch=batch)
    return Named(name, module.train(), example.inputs, entry.loss, example.targets)


def _suggest(key: str, names: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(key, list(names), n=2)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _import(place: str) -> ModuleType:
    if place.endswith(".py"):
        return _import_file(Path(place))
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as e:
        if e.name is None or not (place == e.name or place.startswith(e.name + ".")):
            raise BadInput(f"module {place!r} cannot be imported: {e}") from e
        raise BadInput(f"no module {place!r} (looked in the working directory and the installed packages)") from e
    except Exception as e:
        raise BadInput(f"module {place!r} cannot be imported: {_shown(e)}") from e


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise BadInput(f"no file {str(path)!r}")
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise BadInput(f"{path} cannot be imported: {_shown(e)}") from e
    return module


def _from_factory(name: str, module: ModuleType, factory: str, texts: Sequence[str]) -> Named:
    make = getattr(module, factory, None)
    if not callable(make):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise BadInput(f"{name!r}: no factory {factory!r} there{_suggest(factory, names)}")
    try:
        made = make()
    except Exception as e:
        raise BadInput(f"factory {name!r} raised {_shown(e)}") from e
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 4 or not isinstance(parts[0], nn.Module):
        raise BadInput(f"factory {name!r} gave {type(made).__name__}; {_GIVES}")
    module_, inputs, loss_fn, targets = (*parts, None, None, None)[:4]
    if texts:
        inputs = tuple(parse_input(t) for t in texts)
    if inputs is None:
        raise BadInput(f'factory {name!r} gave a module without example inputs: add --input "4,3,32,32" for each')
    return Named(name, module_.train(), inputs if isinstance(inputs, tuple) else (inputs,), loss_fn, targets)


_GIVES = "it must return a module, (module, example_inputs), or those with loss_fn, or with loss_fn and targets"


def parse_input(text: str) -> Tensor:
    """Return the example tensor of e.g. "4,3,32,32" (random) or "8,128:int64" (zeros).

    Raises:
        BadInput: a size that is not a positive number, or an unknown dtype.
    """
    sizes, _, dtype_name = text.partition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise BadInput(f'--input {text!r}: no dtype {dtype_name!r}; e.g. "8,128:int64"')
    parts = [s.strip() for s in sizes.split(",")]
    if not all(s.isdecimal() and int(s) > 0 for s in parts):
        raise BadInput(f'--input {text!r}: write positive sizes with commas, e.g. "4,3,32,32"')
    shape = [int(s) for s in parts]
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def _shown(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
