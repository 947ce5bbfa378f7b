"""What goes to stdout: with `--json` one document and nothing else, whatever the model's code
prints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from attnopt.compiler.errors import Problem

_kept: list[Any] = []


class Interrupted(Problem):
    """The user pressed Ctrl-C; the shell's exit code for that is 130."""

    exit_code = 130


@contextmanager
def reserved(as_json: bool) -> Iterator[None]:
    """Send everything printed inside to stderr when stdout is kept for a document."""
    if not as_json:
        yield
        return
    _kept.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _kept.pop()


def document(data: Mapping[str, Any]) -> None:
    """Print the one document of this command on the true stdout."""
    from attnopt.cli import draw

    with redirect_stdout(_kept[-1] if _kept else sys.stdout):
        draw.document(data)


def end_with(found: Problem, as_json: bool) -> int:
    """Tell a problem, as a document or on stderr, and return its exit code."""
    from attnopt.cli import draw

    if as_json:
        document({"error": found.as_json()})
    else:
        draw.problem(found)
    return found.exit_code
