"""Codecs: exact encodings of activations. CODECS is the table; one file and one line add one."""

from __future__ import annotations

from collections.abc import Iterable

from graphplan.codecs.narrow import NARROW
from graphplan.codecs.stand_in import BITMASK, STAND_IN
from graphplan.errors import GraphplanError
from graphplan.instructions import Codec

CODECS: dict[str, Codec] = {
    BITMASK.name: BITMASK,
    NARROW.name: NARROW,
    STAND_IN.name: STAND_IN,
}


class UnknownCodec(GraphplanError, ValueError):
    """A codec name that is not in CODECS."""


def choose_codecs(codecs: str | Iterable[str]) -> tuple[Codec, ...]:
    """Return the codecs that `codecs` names: "none", "exact", one name, or several.

    Raises:
        UnknownCodec: a name that is not in CODECS, or "lossy", which no codec here serves yet.
    """
    if codecs == "none":
        return ()
    if codecs == "exact":
        return tuple(c for c in CODECS.values() if c.exact)
    names = (codecs,) if isinstance(codecs, str) else tuple(codecs)
    unknown = [n for n in names if n not in CODECS]
    if unknown:
        raise UnknownCodec(f'no codec {unknown[0]!r}; choose "none", "exact", or from {", ".join(CODECS)}')
    return tuple(CODECS[n] for n in names)
