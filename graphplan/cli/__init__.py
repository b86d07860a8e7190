"""The command line of graphplan: a table of commands, each a function."""

from __future__ import annotations

from collections.abc import Callable

import typer

from graphplan.cli import demo, explore_commands, plan_commands, run_commands
from graphplan.cli.fl_commands import fl_app
from graphplan.cli.output import EXIT_CODES

app = typer.Typer(
    name="graphplan",
    help="Train a PyTorch model inside a byte budget.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan_commands.plan,
    "show": plan_commands.show_plan,
    "diff": plan_commands.diff,
    "run": run_commands.run,
    "check": run_commands.check,
    "pareto": explore_commands.pareto,
    "trace": explore_commands.trace,
    "profile": explore_commands.profile,
    "solvers": plan_commands.list_solvers,
    "models": plan_commands.list_models,
    "demo": demo.demo,
}
for _name, _function in COMMANDS.items():
    app.command(_name, epilog=EXIT_CODES)(_function)
app.add_typer(fl_app)


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["COMMANDS", "app", "main"]
