"""The console scripts `optimize` and `attnopt`: which command runs, and how its end is told.

Exit codes: 0 done and, for a budget, met; 1 a problem that the user can mend; 2 not met; 3 no
attention was found or understood; 130 interrupted. Anything else that is raised is a bug and keeps
its traceback.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from attnopt import __version__
from attnopt.cli.apply import apply
from attnopt.cli.check import check
from attnopt.cli.codegen import codegen
from attnopt.cli.export import export
from attnopt.cli.inspect import inspect
from attnopt.cli.optimize import optimize
from attnopt.cli.stdout import Interrupted, end_with, reserved
from attnopt.compiler.errors import Problem

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # typer does not export it

optimizer = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
optimizer.command()(optimize)

commands = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make the attention of trained models fast, and prove what it cost.",
)
for _command in (optimize, inspect, apply, check, export, codegen):
    commands.command()(_command)


@commands.callback(invoke_without_command=True)
def _attnopt(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"attnopt {__version__}")
        raise typer.Exit


def optimize_main() -> None:
    """The console script `optimize`."""
    sys.exit(run(optimizer, "optimize", sys.argv[1:]))


def main() -> None:
    """The console script `attnopt`."""
    sys.exit(run(commands, "attnopt", sys.argv[1:]))


def run(app: typer.Typer, name: str, argv: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    if app is optimizer and list(argv) == ["--version"]:
        return run(commands, name, argv)
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # torch's, about torch's own code
    as_json = "--json" in argv
    try:
        with reserved(as_json):
            code = get_command(app).main(
                args=list(argv) or ["--help"],
                prog_name=name,
                standalone_mode=False,
                obj=[name, *argv],
            )
    except Problem as found:
        return end_with(found, as_json)
    except _UsageError as wrong:
        return end_with(_usage(wrong, name), as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = Interrupted.exit_code
    if code == Interrupted.exit_code:
        return end_with(Interrupted("A611", "interrupted"), as_json)
    return code if isinstance(code, int) else 0


def _usage(wrong: Exception, name: str) -> Problem:
    """A command line that cannot be read, as a `Problem` A610."""
    context = getattr(wrong, "ctx", None)
    path = context.command_path if context is not None else name
    said = str(getattr(wrong, "format_message", lambda: str(wrong))())
    return Problem("A610", said.rstrip("."), help=f"{path} --help lists the options")
