"""The options of the command that made a folder, read back from its report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

TEXTS = ("text", "calibration")


def recorded(folder: Path) -> dict[str, Any]:
    """The options of the command that made a folder; empty where none is recorded.

    Raises `Problem` A505 where the report is missing or damaged.
    """
    from typer.main import get_command

    from attnopt.cli.main import commands
    from attnopt.compiler.artifact import read_report

    recorded = read_report(folder).get("command")
    try:
        words = shlex.split(recorded) if isinstance(recorded, str) else []
    except ValueError:  # a quotation that does not end
        return {}
    name, *after = (words[1:] if words[:1] == ["attnopt"] else words) or [""]
    if name not in ("optimize", "apply"):
        return {}
    group: Any = get_command(commands)
    made = group.commands[name]
    context = made.make_context(name, list(after), resilient_parsing=True)
    spelled, _, _ = made.make_parser(context).parse_args(list(after))
    # The context drops a path that is not there; here it has to be told.
    paths = {key: Path(spelled[key]) for key in (*TEXTS, "inputs") if key in spelled}
    return {**context.params, **paths}
