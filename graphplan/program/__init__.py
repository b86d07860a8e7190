"""Programs: a planned whole step as JSON, for machines that have not the model's source."""

from graphplan.program.document import ProgramError, ProgramTooLarge
from graphplan.program.load import Program, read_program
from graphplan.program.run import ProgramStep
from graphplan.program.save import write_program

__all__ = ["Program", "ProgramError", "ProgramStep", "ProgramTooLarge", "read_program", "write_program"]
