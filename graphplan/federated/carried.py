"""Carried: local training of programs, by a client that has not the model's source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from graphplan.federated.plans import unpack_texts
from graphplan.measure import measure
from graphplan.program import Program, ProgramStep, ProgramTooLarge, read_program


@dataclass(slots=True)
class Carried:
    """Programs of one step that share their tensors, by descending peak; what they were measured to take."""

    programs: tuple[Program, ...]
    example: tuple[Tensor, Tensor]
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    steps: dict[int, ProgramStep] = field(default_factory=dict)
    measured: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the tensors, to be filled with received weights."""
        self.model = self.programs[0].make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)

    def program(self, order: object) -> ProgramStep:
        """Return the step of one of the programs.

        Raises:
            ProgramError: it is not for the tensors of the first one.
        """
        program = cast(Program, order)
        if program.peak_bytes not in self.steps:
            self.steps[program.peak_bytes] = program.bind(self.model, self.optimizer)
        return self.steps[program.peak_bytes]

    def warm(self, order: object) -> None:
        """Run each op of a program once, alone."""
        self.program(order).warm()

    def peak(self, order: object) -> int:
        """Return the measured peak of one step in bytes, by the allocator's meter; each is measured once."""
        program = cast(Program, order)
        if program.peak_bytes not in self.measured:
            images, labels = self.example
            found = measure(self.program(program), (images,), example_targets=labels, runs=1)
            self.measured[program.peak_bytes] = found.peak_bytes
        return self.measured[program.peak_bytes]


def read_programs(data: bytes, most_bytes: int) -> tuple[Program, ...]:
    """Return the received programs that could run in `most_bytes`, by descending peak.

    Raises:
        ProgramError, PlanFormatError: a damaged or hostile document among them.
        ProgramTooLarge: none is small enough.
    """
    found: list[Program] = []
    error: ProgramTooLarge | None = None
    for text in unpack_texts(data):
        try:
            found.append(read_program(text, most_bytes))
        except ProgramTooLarge as e:
            error = e
    if not found and error is not None:
        raise error
    return tuple(sorted(found, key=lambda p: -p.peak_bytes))
