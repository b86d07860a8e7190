"""What the demo saw: its tables and its picture of both memory timelines."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphplan.cap import can_cap
from graphplan.cli.output import pyplot
from graphplan.cli.tables import grid, share
from graphplan.plan import Plan
from graphplan.units import format_bytes, format_ns

UNPLANNED, PLANNED, BUDGET = "#b3541e", "#1f6f8b", "#333333"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo's processes reported; each is the result of one worker."""

    plan: Plan
    capped_eager: dict[str, Any]
    planned: dict[str, Any]
    eager: dict[str, Any]
    allowance_bytes: int

    @property
    def refused(self) -> bool:
        """Whether the operating system refused memory to the unplanned training."""
        return self.capped_eager.get("refusal") is not None

    @property
    def finished(self) -> bool:
        """Whether the planned training finished under the same cap."""
        return self.planned.get("refusal") is None

    @property
    def within(self) -> bool:
        """Whether the planned step's measured peak is within the budget."""
        return self.finished and self.planned["peak_bytes"] <= self.plan.budget_bytes

    @property
    def ok(self) -> bool:
        """Whether everything that the demo promises was seen."""
        return self.within and (self.refused or not can_cap())


def largest_difference(outcome: Outcome) -> float | None:
    """Return the largest difference between the losses of one step, planned and not; None without a pair."""
    pairs = list(zip(outcome.eager["losses"], outcome.planned["losses"], strict=False))
    return max(abs(a - b) for a, b in pairs) if pairs else None


def demo_tables(outcome: Outcome, capped: bool) -> list[Any]:
    """Return what the demo saw, as tables and sentences."""
    parts: list[Any] = [_losses(outcome), _same(outcome)]
    if capped:
        parts.append(_capped(outcome))
    else:
        parts.append("No cap was set: only Linux limits anonymous memory by RLIMIT_DATA.")
    return [*parts, *([_figures(outcome)] if outcome.finished else [])]


def _losses(outcome: Outcome) -> Any:
    columns = [("step", "right"), ("unplanned", "right"), ("planned", "right"), ("difference", "right")]
    table = grid("Losses: ResNet-18 on handwritten digits", *columns)
    ours, plain = outcome.planned["losses"], outcome.eager["losses"]
    for index, (a, b) in enumerate(zip(plain, ours, strict=False), 1):
        if index <= 3 or index % 4 == 0 or index == len(plain):
            table.add_row(str(index), f"{a:.7f}", f"{b:.7f}", "0" if a == b else f"{abs(a - b):.1e}")
    return table


def _same(outcome: Outcome) -> str:
    largest, steps = largest_difference(outcome), len(outcome.planned["losses"])
    if largest is None:
        return "No losses to compare."
    if largest == 0:
        return f"All {steps} losses are equal to the last bit."
    return f"The largest difference in {steps} losses is {largest:.2e}."


def _capped(outcome: Outcome) -> Any:
    title = f"Under one cap: what is mapped before training + {format_bytes(_allowance(outcome))}"
    table = grid(title, ("process", "left"), ("outcome", "left"))
    for name, result in (("unplanned", outcome.capped_eager), ("planned", outcome.planned)):
        steps, refusal = len(result["losses"]), result.get("refusal")
        text = f"finished {steps} steps" if refusal is None else f"refused in step {steps + 1}: {refusal}"
        table.add_row(name, text)
    return table


def _allowance(outcome: Outcome) -> int:
    """Return the cap's distance from what the planned process had mapped: the same for both processes."""
    cap = outcome.planned.get("cap_bytes") or 0
    return int(cap) - int(outcome.planned.get("before_bytes") or 0)


def _figures(outcome: Outcome) -> Any:
    plain, ours, plan = outcome.eager, outcome.planned, outcome.plan
    table = grid("Measured", ("", "left"), ("unplanned", "right"), ("planned", "right"), ("", "left"))
    note = f"{share(ours['peak_bytes'], plain['peak_bytes'])}; budget {format_bytes(plan.budget_bytes)}, "
    note += f"predicted {format_bytes(plan.peak_bytes)}"
    table.add_row("peak of one step", format_bytes(plain["peak_bytes"]), format_bytes(ours["peak_bytes"]), note)
    times = format_ns(plain["step_ns"]), format_ns(ours["step_ns"])
    table.add_row("training step, each process", *times, "medians; another program's load moves them")
    if plain["pairs"]:
        both = [format_ns(statistics.median(column)) for column in zip(*plain["pairs"], strict=True)]
        ratio = statistics.median(b / a for a, b in plain["pairs"])
        note = f"x{ratio:.2f}, median of {len(plain['pairs'])}; predicted x{1 + plan.overhead:.2f}"
        table.add_row("training step, side by side", *both, note)
    return table


def draw(outcome: Outcome, path: Path) -> None:
    """Draw both memory timelines and the budget."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 5), dpi=130)
    for name, result, colour in (
        ("unplanned", outcome.eager, UNPLANNED),
        ("planned", outcome.planned, PLANNED),
    ):
        times, levels = _curve(result)
        label = f"{name}: peak {format_bytes(result['peak_bytes'])}"
        axes.fill_between(times, levels, step="post", color=colour, alpha=0.12, linewidth=0)
        axes.step(times, levels, where="post", color=colour, linewidth=1.6, label=label)
    budget = outcome.plan.budget_bytes / 2**20
    label = f"budget: {format_bytes(outcome.plan.budget_bytes)}"
    axes.axhline(budget, color=BUDGET, linestyle="--", linewidth=1.3, label=label)
    axes.set_xlabel("progress of the step (% of its own time)")
    axes.set_ylabel("tensor memory in use (MiB)")
    axes.set_title("One training step of ResNet-18, unplanned and planned", loc="left", fontsize=12)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1.22 * outcome.eager["peak_bytes"] / 2**20)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False, ncols=3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _curve(result: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return the share of the step's time in percent, and MiB, from the resident level on."""
    points = [(0, result["resident_bytes"]), *((t, level) for t, level in result["timeline"])]
    end = points[-1][0] / 100 or 1.0
    return [t / end for t, _ in points], [level / 2**20 for _, level in points]
