"""What the report writers share: text between a page's markers, pictures that repeat themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->` in `path`."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = path.read_text()
    if begin not in page or end not in page:
        raise SystemExit(f"{path} has no {begin} ... {end}")
    before, rest = page.split(begin, 1)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing the same file from the same figures."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "graphplan"
    import matplotlib.pyplot as plt

    return plt
