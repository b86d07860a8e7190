"""Codecs: encodings of activations, exact and lossy. CODECS is the table; one file and one line add one."""

from __future__ import annotations

from collections.abc import Iterable

from graphplan.codecs.fewbit import FEWBIT2, FEWBIT4
from graphplan.codecs.lossy import BF16, INT2, INT4, INT8, Lossy
from graphplan.codecs.mixed import MIXED3
from graphplan.codecs.narrow import NARROW
from graphplan.codecs.stand_in import BITMASK, STAND_IN
from graphplan.errors import GraphplanError
from graphplan.instructions import Codec

CODECS: dict[str, Codec] = {
    BITMASK.name: BITMASK,
    NARROW.name: NARROW,
    STAND_IN.name: STAND_IN,
    BF16.name: BF16,
    INT8.name: INT8,
    INT4.name: INT4,
    INT2.name: INT2,
    MIXED3.name: MIXED3,
    FEWBIT4.name: FEWBIT4,
    FEWBIT2.name: FEWBIT2,
}


__all__ = ["CODECS", "Lossy", "UnknownCodec", "choose_codecs"]


class UnknownCodec(GraphplanError, ValueError):
    """A codec name that is not in CODECS."""


def choose_codecs(codecs: str | Iterable[str]) -> tuple[Codec, ...]:
    """Return the codecs that `codecs` names: "none", "exact", "lossy" (exact ones too), one name, or several.

    Raises:
        UnknownCodec: what is not in CODECS.
    """
    if codecs == "none":
        return ()
    if codecs == "exact":
        return tuple(c for c in CODECS.values() if c.exact)
    if codecs == "lossy":
        return tuple(CODECS.values())
    names = (codecs,) if isinstance(codecs, str) or not isinstance(codecs, Iterable) else tuple(codecs)
    unknown = [n for n in names if n not in CODECS]
    if unknown:
        raise UnknownCodec(f'no codec {unknown[0]!r}; choose "none", "exact", "lossy", or from {", ".join(CODECS)}')
    return tuple(CODECS[n] for n in names)
