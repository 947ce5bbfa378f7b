"""`attnopt check --lock FILE MODEL`: read a model again, and fail when an attention of the lock is
lost, or understood less well.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.cli import options
from attnopt.cli.stdout import document
from attnopt.compiler.errors import Problem

if TYPE_CHECKING:
    from attnopt.compiler.lock_diff import Difference

_MARKS = {"lost": "bold red", "weaker": "bold red", "different": "bold red", "moved": "yellow",
          "gained": "green"}  # fmt: skip


def check_lock(
    file: Path,
    model: str | None,
    reading: dict[str, Any],
    form: dict[str, Any],
    *,
    threads: int | None,
    json: bool,
) -> bool:
    """Compare a model with its lock, tell the difference, and return whether the lock holds.

    `reading` is how the model is read, `form` the options that a lock records: those left out are
    taken from it.
    """
    from attnopt.cli.progress import Progress

    if model is None:
        raise Problem(
            "A614", "the model to compare with the lock is missing",
            help=f"attnopt check --lock {file} MODEL",
        )  # fmt: skip
    with Progress("check", quiet=json) as bar:
        bar("starting torch", 0.0)
        options.set_threads(threads)
        from attnopt.compiler.inspect import inspect
        from attnopt.compiler.lock import OPTIONS, lock, read_lock
        from attnopt.compiler.lock_diff import difference

        then = read_lock(file)
        asked = {name: _first(form[name], then.options.get(name)) for name in OPTIONS}
        found = inspect(model, time=False, **reading, **asked, progress=bar)
        told = difference(then, lock(found, asked))
    if json:
        document(told.as_json())
    else:
        _draw(told, len(then.sites))
    return told.ok


def refuse(given: dict[str, Any], *, both: bool) -> None:
    """Raise `Problem` A614 for a command line that asks for a lock and for a run at once."""
    if both:
        raise Problem(
            "A614", "DIR and --lock are two checks",
            help="attnopt check DIR [MODEL] for a run, attnopt check --lock FILE MODEL for a lock",
        )  # fmt: skip
    wrong = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if wrong:
        raise Problem(
            "A614", f"{', '.join(wrong)} has no meaning with --lock",
            why="a lock holds what was understood of a model; nothing is measured",
            help="leave it out, or check a run: attnopt check DIR",
        )  # fmt: skip


def _first(given: Any, recorded: Any) -> Any:
    return recorded if given is None else given


def _draw(told: Difference, count: int) -> None:
    from attnopt.cli import draw

    for change in told.changes:
        draw.line(f"{change.kind:<9}  {change.module}: {change.what}", _MARKS[change.kind])
    for name, (was, now) in told.versions.items():
        draw.line(f"{'version':<9}  {name}: {was or 'none'} in the lock, {now or 'none'} now")
    for note in told.notes:
        draw.line(f"{'note':<9}  {note}")
    broken = len({change.module for change in told.changes if change.fails})
    if told.ok:
        draw.line(f"the lock holds: {count} attentions", "green")
    else:
        draw.line(f"the lock does not hold: {broken} of {count} attentions", "red")
        draw.line("attnopt inspect MODEL --why SITE shows what is in the way of one")
