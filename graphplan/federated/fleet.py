"""Fleets: device classes in TOML, the members drawn from them, and the clock that they would keep (simulated)."""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from typing import Any

from graphplan.errors import BudgetError
from graphplan.federated.config import FederatedError
from graphplan.units import parse_budget

DEFAULT_FLEET = """\
[[class]]
name = "low"
share = 0.4
memory = [0.2, 0.6]     # of the unplanned step's peak, evenly spread; or sizes, "64MiB"
speed = 0.25            # of the machine that profiles
uplink_mbps = 2.0
downlink_mbps = 10.0

[[class]]
name = "middle"
share = 0.4
memory = [0.5, 0.9]
speed = 0.5
uplink_mbps = 8.0
downlink_mbps = 40.0

[[class]]
name = "high"
share = 0.2
memory = [0.8, 1.1]
speed = 1.0
uplink_mbps = 20.0
downlink_mbps = 100.0
"""
_KEYS = {"name", "share", "memory", "speed", "uplink_mbps", "downlink_mbps", "wobble"}


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """A kind of client. `memory` are the ends of an even spread: fractions of the unplanned peak, or bytes.

    `wobble` is the largest fraction of the budget that other programs take away in a round.
    """

    name: str
    share: float
    memory: tuple[float | int, float | int]
    speed: float
    uplink_mbps: float
    downlink_mbps: float
    wobble: float = 0.0


@dataclass(frozen=True, slots=True)
class Member:
    """One simulated client: its class and where it stands in the spread of memory, from 0 to 1."""

    of: DeviceClass
    place: float

    def budget_bytes(self, unplanned_bytes: int, seed: int, client: int, server_round: int) -> int:
        """Return the bytes that it has in `server_round`, for a step that takes `unplanned_bytes` unplanned."""
        low, high = (_in_bytes(m, unplanned_bytes) for m in self.of.memory)
        budget = low + self.place * (high - low)
        away = random.Random(f"{seed}/{client}/{server_round}").random() * self.of.wobble
        return int(budget * (1 - away))

    def seconds(self, steps: int, step_ns: int, down_bytes: int, up_bytes: int) -> float:
        """Return the simulated seconds of one round: download, `steps` local steps, upload."""
        link = 8 * down_bytes / (self.of.downlink_mbps * 1e6) + 8 * up_bytes / (self.of.uplink_mbps * 1e6)
        return link + steps * step_ns / 1e9 / self.of.speed


def read_fleet(text: str) -> tuple[DeviceClass, ...]:
    """Read a fleet's TOML.

    Raises:
        FederatedError: not TOML, an unknown or missing key, or a number that cannot be meant.
    """
    try:
        tables = tomllib.loads(text).get("class", [])
    except tomllib.TOMLDecodeError as e:
        raise FederatedError(f"the fleet is not TOML: {e}") from e
    if not tables:
        raise FederatedError("the fleet has no [[class]] table")
    return tuple(_read_class(i, table) for i, table in enumerate(tables))


def draw(classes: tuple[DeviceClass, ...], clients: int, seed: int) -> tuple[Member, ...]:
    """Return `clients` members; shares are met to the nearest client, places are drawn with `seed`."""
    total, dealt = sum(c.share for c in classes), 0.0
    members: list[Member] = []
    source = random.Random(f"fleet/{seed}")
    for c in classes:
        dealt += c.share
        while len(members) < round(clients * dealt / total):
            members.append(Member(c, source.random()))
    source.shuffle(members)
    return tuple(members)


def _read_class(index: int, table: dict[str, Any]) -> DeviceClass:
    where = f"fleet class {table.get('name', index)!r}"
    if unknown := table.keys() - _KEYS:
        raise FederatedError(f"{where}: unknown keys {sorted(unknown)}; there are {sorted(_KEYS)}")
    if missing := _KEYS - {"wobble"} - table.keys():
        raise FederatedError(f"{where}: missing keys {sorted(missing)}")
    memory = table["memory"] if isinstance(table["memory"], list) else [table["memory"]] * 2
    try:
        ends = tuple(parse_budget(m, 0) if isinstance(m, str) else float(m) for m in memory)
        numbers = {k: float(table[k]) for k in ("share", "speed", "uplink_mbps", "downlink_mbps")}
        found = DeviceClass(str(table["name"]), memory=ends, wobble=float(table.get("wobble", 0)), **numbers)  # type: ignore[arg-type]
    except (BudgetError, TypeError, ValueError) as e:
        raise FederatedError(f"{where}: {e}") from e
    if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
        raise FederatedError(f"{where}: memory is {table['memory']!r}; write [low, high], both positive")
    if min(numbers.values()) <= 0 or not 0 <= found.wobble < 1:
        raise FederatedError(f"{where}: share, speed and links must be positive, wobble in [0, 1)")
    return found


def _in_bytes(memory: float | int, unplanned_bytes: int) -> float:
    return memory if isinstance(memory, int) else memory * unplanned_bytes
