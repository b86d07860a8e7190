"""What the report writers share: text between a page's markers, pictures that repeat themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def between(path: Path, name: str) -> str:
    """Return what stands between `<!-- NAME -->` and `<!-- end of NAME -->` in `path`."""
    return _parts(path, name)[1]


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->` in `path`."""
    before, _, after = _parts(path, name)
    path.write_text(f"{before}\n{text}\n{after}")


def _parts(path: Path, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = path.read_text()
    if begin not in page or end not in page:
        raise SystemExit(f"{path} has no {begin} ... {end}")
    before, rest = page.split(begin, 1)
    text, after = rest.split(end, 1)
    return before + begin, text, end + after


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing the same file from the same figures."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "graphplan"
    import matplotlib.pyplot as plt

    return plt
