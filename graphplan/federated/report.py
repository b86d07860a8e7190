"""Report: what a run's events add up to, as the command line shows it and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graphplan.federated.config import RunConfig

NOTE = (
    "simulated_seconds is computed from profiled op times, device speeds and bytes sent; wall_seconds, step_ns and "
    "measured_peak_bytes are measured"
)


@dataclass(slots=True)
class Report:
    """Collects events; `missing` counts replies that a round should have had."""

    config: RunConfig
    start: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    clients: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    ended: bool = False

    def take(self, event: dict[str, Any]) -> None:
        """Add one event."""
        kind, rest = event["event"], {k: v for k, v in event.items() if k != "event"}
        if kind == "start":
            self.start = rest
        elif kind == "round" and rest["round"] > 0:
            self.rounds.append(rest)
        elif kind == "round":
            self.start.update(initial_accuracy=rest["accuracy"], initial_loss=rest["loss"])
        elif kind == "end":
            self.clients, self.ended = rest["clients"], True
        elif kind == "error":
            self.error = rest

    @property
    def failed(self) -> int:
        """Replies that failed or never came, over all rounds."""
        return sum(r["failed"] for r in self.rounds)

    def json(self) -> dict[str, Any]:
        """Return everything."""
        last = self.rounds[-1] if self.rounds else {}
        return {
            "command": "fl run",
            **self.start,
            "accuracy": last.get("accuracy"),
            "loss": last.get("loss"),
            "simulated_seconds": sum(r["simulated_seconds"] for r in self.rounds),
            "failed": self.failed,
            "note": NOTE,
            "rounds": self.rounds,
            "clients": self.clients,
        }
