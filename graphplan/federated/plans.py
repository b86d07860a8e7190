"""Plans, the server's side: how a method's clients execute a step, and the frontier that each gets its plan from."""

from __future__ import annotations

import json
import zlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace

import torch

import solvers
from graphplan.choices import Candidate, Candidates, frontier, prepare_candidates, with_parts
from graphplan.device import Device
from graphplan.errors import PlanFormatError
from graphplan.federated.config import FederatedError, RunConfig
from graphplan.federated.frontier import MOST_POINTS, Frontier, FrontierCache
from graphplan.federated.task import Task, task_loss, task_options
from graphplan.lift import lift
from graphplan.lower import computing_once
from graphplan.optimize import Source
from graphplan.plan import Plan
from graphplan.program import write_program
from graphplan.step import TrainStep
from graphplan.step.program import WholeProgram

SPARE = 5  # smaller plans that a client holds beside its own, to shrink without asking
MOST_BYTES = 8 << 20  # of plans unpacked from one message


@dataclass(frozen=True, slots=True)
class Execution:
    """How clients of a method run a step.

    `planned` False: plain PyTorch, in the unplanned peak or not at all. `recompute` False takes every second
    computation out of the problem, so that only codecs are left.

    `whole`: plans are of whole steps; with `forms`, of those forms that round otherwise, too, and on parts of the batch
    where that takes less. `hybrid`: the method has no form of its own to keep to (`under`).
    """

    planned: bool = True
    codecs: str = "exact"
    solver: str = "auto"
    recompute: bool = True
    whole: bool = False
    forms: bool = False
    hybrid: bool = False

    def under(self, config: RunConfig) -> Execution:
        """Return how clients of this run execute.

        Only a hybrid is free to take other codecs and forms. Whole steps take exact codecs unless it names some.
        """
        if not self.planned or not self.hybrid:
            return replace(self, whole=self.planned and config.whole)
        whole = config.whole or config.forms
        codecs = config.codecs or ("exact" if whole else self.codecs)
        return replace(self, codecs=codecs, whole=whole, forms=config.forms)


HYBRID = Execution(codecs="lossy", hybrid=True)  # keep, recompute or compress, within the cap on gradient noise


@dataclass(slots=True)
class Planner:
    """Answers budgets for one task: one frontier for each class of device, one solve for each of its plans."""

    task: Task
    execution: Execution
    config: RunConfig
    devices: dict[str, Device] = field(default_factory=dict)
    made: dict[Hashable, Frontier] = field(default_factory=dict)  # what an earlier run of the same task has found
    cache: FrontierCache = field(init=False)
    texts: dict[tuple[str, int], bytes] = field(default_factory=dict)  # by class and place on its frontier
    grounds: dict[str, Candidate] = field(default_factory=dict)  # what each class was planned on

    def __post_init__(self) -> None:
        """Start from what was made before."""
        self.cache = FrontierCache(self._make, self.made)

    def frontier(self, device_class: str) -> Frontier:
        """Return the frontier of a class; its Device, when one was reported, is planned for."""
        return self.cache.get((device_class, self.execution))

    def threads(self, device_class: str) -> int:
        """Return on how many threads a class's ops were measured: kernels' scratch depends on it."""
        given = self.devices.get(device_class)
        return given.threads if given else torch.get_num_threads()

    def unplanned(self, device_class: str) -> Plan:
        """Return the class's plan at the unplanned peak: what a step takes and costs without a plan."""
        return self.frontier(device_class).plans[-1]

    def for_budget(self, device_class: str, budget_bytes: int) -> tuple[Plan, ...]:
        """Return the plan for a budget, then smaller ones; none: nothing fits."""
        frontier = self.frontier(device_class)
        if not self.execution.planned:
            return frontier.plans[-1:] if frontier.plans[-1].baseline_peak_bytes <= budget_bytes else ()
        return frontier.below(budget_bytes, SPARE)

    def packed(self, device_class: str, budget_bytes: int) -> bytes:
        """Return `for_budget` as it travels, empty where nothing fits; each place of a frontier is packed once."""
        key = device_class, self.frontier(device_class).index(budget_bytes)
        if key not in self.texts:
            plans = self.for_budget(device_class, budget_bytes)
            self.texts[key] = pack(self._text(device_class, p) for p in plans) if plans else b""
        return self.texts[key]

    def _text(self, device_class: str, plan: Plan) -> str:
        """Return the plan, or the program that runs it, as JSON."""
        if not self.config.program:
            return plan.to_json()
        ground = self.grounds[device_class]
        program = WholeProgram.of(ground.captured, ground.prepared, plan)
        return write_program(self.task.model, program, plan, list(self.task.example))

    def _make(self, key: Hashable) -> Frontier:
        device_class = key[0] if isinstance(key, tuple) else ""
        execution, (images, labels) = self.execution, self.task.example
        given = self.devices.get(device_class)
        options = task_options(self.task, "100%", execution.codecs, execution.solver, self.config.time_limit, given)
        model = self.task.fresh()
        if execution.whole:
            optimizer = torch.optim.SGD(model.parameters(), self.config.learning_rate)
            step = TrainStep(model, task_loss, optimizer, options)
            options, source = step.options, step.source(images, labels)
        else:
            source = Source.of(model, (images,), {}, options)
        device = given or Device.this(images.device)
        captured = source.captures() if execution.forms else source.to_the_bit()
        candidates = prepare_candidates(captured, options, device, source)
        if execution.forms:
            candidates = with_parts(candidates, options, source)
        if execution.forms and given is not None:
            candidates = _measured(candidates)
        self.grounds[device_class] = candidates[0]
        prepared = candidates[0].prepared
        if not execution.planned:
            kept = solvers.solve(prepared.problem, "keep_all")
            return Frontier((lift(prepared, kept, prepared.baseline_peak_bytes),))
        if not execution.recompute:
            once = replace(prepared, problem=computing_once(prepared.problem))
            candidates = (replace(candidates[0], prepared=once),)
        return Frontier(frontier(candidates, options, min(MOST_POINTS, self.config.points), source.batch))


def _measured(candidates: Candidates) -> Candidates:
    """Return the candidates of whose ops a saved profile holds all.

    Raises:
        FederatedError: there is none.
    """
    found = tuple(c for c in candidates if c.prepared.profile.measured)
    if not found:
        raise FederatedError(
            "the device's profile lacks ops of whole steps, whose memory must not be guessed: without a profile each "
            "client measures itself; without --forms plans of forward and backward are made"
        )
    return found


def pack(texts: Iterable[str]) -> bytes:
    """Return plans or programs, given as JSON, as they travel: deflated."""
    return zlib.compress(json.dumps(list(texts)).encode(), level=9)


def unpack(data: bytes) -> tuple[Plan, ...]:
    """Return the plans in what `pack` wrote.

    Raises:
        PlanFormatError: as `unpack_texts`, or not plans.
    """
    return tuple(Plan.from_json(t) for t in unpack_texts(data))


def unpack_texts(data: bytes) -> list[str]:
    """Read what `pack` wrote.

    Raises:
        PlanFormatError: damaged, larger than MOST_BYTES, or not a list of texts.
    """
    reader = zlib.decompressobj()
    try:
        text = reader.decompress(data, MOST_BYTES)
        if reader.unconsumed_tail or not reader.eof:
            raise PlanFormatError(f"the plans are cut off, or unpack to more than {MOST_BYTES} bytes")
        texts = json.loads(text)
    except (zlib.error, ValueError) as e:
        raise PlanFormatError(f"the plans are damaged: {e}") from e
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise PlanFormatError("expected a list of plans")
    return texts
