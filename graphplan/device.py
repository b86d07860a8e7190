"""Device: what was measured of the instructions on one machine; it can be saved and stand in for that machine."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch

from graphplan.errors import GraphplanError

FORMAT = "graphplan-device-1"


class DeviceFormatError(GraphplanError, ValueError):
    """A device file that cannot be read: truncated, not JSON, or of an unknown version."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One instruction at one set of shapes: `touched_bytes` are read and written, `cost_ns` is a median."""

    target: str
    touched_bytes: int
    cost_ns: int
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class Device:
    """A machine as the planner sees it. `samples` grows as graphs are profiled (the one mutable field)."""

    name: str
    kind: str
    threads: int
    torch_version: str
    samples: dict[str, Sample] = field(default_factory=dict)

    @staticmethod
    def this(device: torch.device | None = None) -> Device:
        """Return this machine, nothing measured yet."""
        device = device or torch.device("cpu")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
        return Device(name, device.type, torch.get_num_threads(), torch.__version__)

    def estimate(self, target: str, touched_bytes: int) -> Sample:
        """Return a Sample for shapes that were not measured: the same op scaled by bytes, else any op."""
        same = [s for s in self.samples.values() if s.target == target and s.touched_bytes > 0]
        pool = same or [s for s in self.samples.values() if s.touched_bytes > 0]
        if not pool:
            # Nothing was measured: 5 GB/s and 2 us a call, a slow CPU's memory-bound op.
            return Sample(target, touched_bytes, 2000 + touched_bytes // 5, 0)
        near = min(pool, key=lambda s: abs(s.touched_bytes - touched_bytes))
        ratio = touched_bytes / near.touched_bytes
        rate = statistics.median(s.cost_ns / s.touched_bytes for s in pool) * touched_bytes
        cost = near.cost_ns * ratio if same else rate
        workspace = max((s.workspace_bytes / s.touched_bytes for s in same), default=0.0) * touched_bytes
        return Sample(target, touched_bytes, max(1, int(cost)), int(workspace))

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(self.to_json() + "\n")

    def to_json(self) -> str:
        """Return the JSON text that `save` writes."""
        samples = {k: [s.target, s.touched_bytes, s.cost_ns, s.workspace_bytes] for k, s in self.samples.items()}
        head = {"format": FORMAT, "name": self.name, "kind": self.kind, "threads": self.threads}
        return json.dumps({**head, "torch_version": self.torch_version, "samples": samples}, indent=0)

    @staticmethod
    def load(path: str | Path) -> Device:
        """Read what `save` wrote.

        Raises:
            DeviceFormatError: not JSON (truncated?), another format, or a missing field.
        """
        try:
            return Device.from_json(Path(path).read_text())
        except DeviceFormatError as e:
            raise DeviceFormatError(f"{path}: {e}") from e

    @staticmethod
    def from_json(text: str) -> Device:
        """Read a device from JSON text; raises DeviceFormatError as `load` does."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise DeviceFormatError(f"format {data['format']!r}, expected {FORMAT!r}")
            samples = {k: Sample(str(t), int(b), int(c), int(w)) for k, (t, b, c, w) in data["samples"].items()}
            return Device(data["name"], data["kind"], int(data["threads"]), data["torch_version"], samples)
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise DeviceFormatError(f"not a device file (truncated?): {type(e).__name__} {e}") from e


def sample_key(text: str) -> str:
    """Return the key under which an instruction's text (ops, shapes, strides, dtypes) is stored."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]
