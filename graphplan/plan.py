"""Plan: a schedule bound to a named graph, a device and a budget. Versioned JSON, checked on load; never a pickle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from graphplan.errors import PlanFormatError
from graphplan.units import format_bytes, format_ns

FORMAT = "graphplan-plan"
VERSION = 4


@dataclass(frozen=True, slots=True)
class Decision:
    """The fate of one activation: "keep", "recompute" or "compress" (then `codec` and `encoded_bytes`)."""

    fate: str
    nbytes: int
    codec: str | None = None
    encoded_bytes: int = 0

    def __str__(self) -> str:
        """Return e.g. "compress 4.0 MiB -> 512.0 KiB (bitmask)"."""
        if self.codec is None:
            return f"{self.fate} {format_bytes(self.nbytes)}"
        return f"{self.fate} {format_bytes(self.nbytes)} -> {format_bytes(self.encoded_bytes)} ({self.codec})"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a planned step does and promises. All bytes are of the whole step as `graphplan.measure` reads it.

    The figures hold for a step that begins with every `p.grad` None (`zero_grad()`'s default); gradients that
    already exist cost their own bytes beside it. `overhead` is extra time over running every op once, as a
    fraction; `lower_bound_ns` bounds `cost_ns` over every plan of class `bound_class`; `gap` is
    (cost - bound) / cost. `any_bound_ns` and `any_gap` are the same for every plan in the program's order,
    however often it recomputes after the turn. `noise` is what its lossy codes are predicted to add to the
    gradient, as a share of the gradient's variance over batches; `gradient_noise` is the cap on it. `noise_measured`
    and `noise_bias` (which part of the error leans one way) are of all codes at once, on the example batch; 0 where
    there is no lossy code, None where nothing was run.
    """

    model: str
    fingerprint: str
    steps: tuple[str, ...]
    decisions: dict[str, Decision]
    budget_bytes: int
    peak_bytes: int
    baseline_peak_bytes: int
    minimum_peak_bytes: int
    fixed_bytes: int
    outside_bytes: int
    loss_measured: bool
    cost_ns: int
    baseline_cost_ns: int
    lower_bound_ns: int
    bound_class: str
    any_bound_ns: int
    status: str
    solver: str
    codecs: tuple[str, ...]
    peak_step: str
    peak_live: tuple[tuple[str, int], ...]
    minimum_reason: str
    device: str
    torch_version: str
    measured: bool
    gradient_noise: float
    noise: float
    noise_measured: float | None
    noise_bias: float | None
    update: str = ""  # of a whole step: the optimizer's function ("sgd", "adam"); the loss is inside, too
    saved: tuple[tuple[str, int], ...] = ()  # (by what, bytes): how much higher the peak would be without it
    parts: int = 1  # of the batch, on which the model runs one after the other
    released: tuple[str, ...] = ()  # gradients of outputs that the loss lets go of, so that they die at their last use

    @property
    def overhead(self) -> float:
        """Extra predicted time over running every op once, as a fraction of it."""
        return (self.cost_ns - self.baseline_cost_ns) / max(1, self.baseline_cost_ns)

    @property
    def gap(self) -> float:
        """How far `cost_ns` may be above the best plan of class `bound_class`, as a fraction of `cost_ns`."""
        return max(0, self.cost_ns - self.lower_bound_ns) / max(1, self.cost_ns)

    @property
    def any_gap(self) -> float:
        """How far `cost_ns` may be above any plan in the program's order, as a fraction of `cost_ns`."""
        return max(0, self.cost_ns - self.any_bound_ns) / max(1, self.cost_ns)

    def _noise_line(self) -> str:
        found = "not measured"
        if self.noise_measured is not None and self.noise_bias is not None:
            found = f"measured {self.noise_measured:.3g}, of which bias {self.noise_bias:.0%}"
        predicted = f"predicted {self.noise:.3g} of the gradient's variance"
        return f"gradient noise: {predicted}, cap {self.gradient_noise:g}; {found}"

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return (how many, bytes) of the activations of each fate."""
        out = {"keep": (0, 0), "recompute": (0, 0), "compress": (0, 0)}
        for d in self.decisions.values():
            n, total = out[d.fate]
            out[d.fate] = (n + 1, total + d.nbytes)
        return out

    def save(self, path: str | Path) -> None:
        """Write JSON; a reader sees the old file or the whole new one."""
        target = Path(path)
        scratch = target.with_name(target.name + ".tmp")
        scratch.write_text(self.to_json())
        scratch.replace(target)

    def to_json(self) -> str:
        """Return the JSON text that `save` writes."""
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(data, indent=1) + "\n"

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            PlanFormatError: truncated or not JSON, another format or version, a missing, unknown or wrong field.
        """
        try:
            return Plan.from_json(Path(path).read_text())
        except PlanFormatError as e:
            raise PlanFormatError(f"{path}: {e}") from e

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan from JSON text; raises PlanFormatError as `load` does."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise PlanFormatError(f"not JSON (truncated?): {e}") from e
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise PlanFormatError(f"not a plan: expected format {FORMAT!r}")
        version = data.pop("version", None)
        if version != VERSION:
            raise PlanFormatError(f"plan version {version!r}; this graphplan reads version {VERSION}")
        names = {f.name for f in fields(Plan)}
        if names != data.keys():
            missing, extra = sorted(names - data.keys()), sorted(data.keys() - names)
            raise PlanFormatError(f"missing fields {missing}" if missing else f"unknown fields {extra}")
        return _checked(data)

    def diff(self, other: Plan) -> str:
        """Return what `other` does differently: figures, then activations whose fate changed."""
        lines = [f"# plan diff: {self.model}, {format_bytes(self.budget_bytes)} -> {format_bytes(other.budget_bytes)}"]
        if self.fingerprint != other.fingerprint:
            lines.append(f"different graphs: {self.fingerprint} and {other.fingerprint}")
        lines.append(f"peak      {format_bytes(self.peak_bytes)} -> {format_bytes(other.peak_bytes)}")
        lines.append(f"overhead  {self.overhead:.2%} -> {other.overhead:.2%}")
        for name in sorted(self.decisions.keys() | other.decisions.keys()):
            a, b = self.decisions.get(name), other.decisions.get(name)
            if a != b:
                lines.append(f"{name}: {a or 'absent'} -> {b or 'absent'}")
        return "\n".join(lines)

    def __str__(self) -> str:
        """Return the plan as text: first who made it and what it promises, then every decision."""
        head = (
            f"# plan: {self.model}, {self.solver}, {self.status}; budget {format_bytes(self.budget_bytes)}, "
            f"peak {format_bytes(self.peak_bytes)}, {self.overhead:+.2%} time, "
            f"gap {self.gap:.2%} ({self.bound_class}), {self.any_gap:.2%} (any plan in this order)"
        )
        unplanned = f"unplanned {format_bytes(self.baseline_peak_bytes)} in {format_ns(self.baseline_cost_ns)}"
        lines = [head, f"{unplanned}; least feasible {format_bytes(self.minimum_peak_bytes)} ({self.minimum_reason})"]
        how = "measured" if self.loss_measured else "three times the outputs: pass loss_fn to measure it"
        if self.update:
            lines.append(f"whole step: the loss and the update ({self.update}) are in it")
        else:
            lines.append(
                f"p.grad is None when the step begins; {format_bytes(self.outside_bytes)} for the loss ({how})"
            )
        if self.parts > 1:
            lines.append(f"the model runs on {self.parts} parts of the batch in turn: gradients accumulate")
        if self.noise or self.noise_measured:
            lines.append(self._noise_line())
        if not self.measured:
            lines.append("some ops were estimated, not measured: the peak may be off by their workspace")
        for fate, (n, total) in self.counts().items():
            lines.append(f"{fate:<10} {n:>5} activations {format_bytes(total):>12}")
        lines.extend(f"saved {format_bytes(n)} of peak by {what}" for what, n in self.saved)
        lines.append(f"at the peak, step {self.peak_step!r}:")
        lines.extend(f"  {format_bytes(n):>12}  {name}" for name, n in self.peak_live)
        lines.extend(f"{name}: {d}" for name, d in self.decisions.items() if d.fate != "keep")
        return "\n".join(lines)


def _checked(data: dict[str, Any]) -> Plan:
    """Build the Plan from parsed JSON, refusing a field of another type."""
    try:
        decisions = {str(k): Decision(**v) for k, v in data["decisions"].items()}
        pairs = {k: tuple((str(name), int(n)) for name, n in data[k]) for k in ("peak_live", "saved")}
    except (AttributeError, TypeError, ValueError) as e:
        raise PlanFormatError(f"decisions, peak_live or saved is malformed: {e}") from e
    for f in fields(Plan):
        value, wanted = data[f.name], {"int": int, "str": str, "bool": bool, "float": float}.get(str(f.type))
        if wanted is not None and type(value) is not wanted:
            raise PlanFormatError(f"field {f.name!r} is {value!r}, expected {f.type}")
    for name in ("steps", "codecs", "released"):
        if not isinstance(data[name], list) or not all(isinstance(s, str) for s in data[name]):
            raise PlanFormatError(f"field {name!r} is not a list of names")
    if any(d.fate not in ("keep", "recompute", "compress") for d in decisions.values()):
        raise PlanFormatError("a decision has an unknown fate")
    lists = {name: tuple(data[name]) for name in ("steps", "codecs", "released")}
    return Plan(**{**data, **lists, **pairs, "decisions": decisions})
