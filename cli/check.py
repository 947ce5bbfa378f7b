"""`attnopt check DIR`: measure a finished run again, and fail when it is out of bounds."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from attnopt.cli import options
from attnopt.cli.stdout import document
from attnopt.compiler.errors import Problem

NOT_MET = 2


def check(
    folder: Annotated[Path, typer.Argument(help="The folder that optimize wrote.", metavar="DIR")],
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="The original model (default: the one of the run)."),
    ] = None,
    min_speed: Annotated[
        str | None,
        typer.Option(
            help="Least speed-up, e.g. 1.8x (default: the budget, or the report's less a tenth)."
        ),
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="Largest loss of accuracy (default: the report's).")
    ] = None,
    metric: options.Metric = None,
    text: options.Text = None,
    calibration: options.Calibration = None,
    inputs: options.Inputs = None,
    batch: options.Batch = None,
    length: options.Length = None,
    allow_global: options.AllowGlobal = None,
    trust: options.Trust = False,
    attention: options.Attention = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> int:
    """Measure the run in DIR again; exit 2 when speed or accuracy is out of bounds."""
    from attnopt.autotune.request import parse_budget, parse_share
    from attnopt.cli import draw
    from attnopt.cli.progress import Progress

    bounds: dict[str, Any] = {
        "min_speed": None if min_speed is None else parse_budget(min_speed),
        "max_drop": None if max_drop is None else parse_share(max_drop),
    }
    given = {
        "text": text,
        "calibration": calibration,
        "inputs": inputs,
        "batch": batch,
        "length": length,
    }
    form = {"attention": attention, "dtype": dtype}
    original, asked = _as_then(folder, model, given, form)
    with Progress("check", quiet=json) as bar:
        bar("starting torch", 0.0)
        options.set_threads(threads)
        from attnopt.autotune.replay import check as measure

        options.find_metric(metric)
        found = measure(
            folder, original, **bounds, **asked, metric=metric, trust=trust,
            allow_globals=tuple(allow_global or ()), progress=bar,
        )  # fmt: skip
    if json:
        document(found.as_json())
    else:
        for told in found.lines:
            draw.line(told)
        draw.line("within bounds" if found.ok else "out of bounds", "green" if found.ok else "red")
    return 0 if found.ok else NOT_MET


def _as_then(
    folder: Path, model: str | None, data: dict[str, Any], form: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The model, its data and the form it is read in: what was given, else what the run had.

    A report can come from a stranger. So only a path to a model and its data are taken over, never
    code to import (`module:callable`) and never `--trust` or `--allow-global`.
    """
    then = _recorded(folder)
    if not any(value is not None for value in data.values()):
        data = {key: then.get(key) for key in data}
    form = {key: then.get(key) if value is None else value for key, value in form.items()}
    named = model if model is not None else then.get("model")
    if model is None and (named is None or not Path(named).exists()):
        raise Problem(
            "A612",
            "the original model is needed to compare with",
            where=str(folder),
            why=f"the run was made from {named}, which is not here" if named else "",
            help=f"attnopt check {shlex.quote(str(folder))} MODEL",
        )
    return str(named), {**data, **form}


def _recorded(folder: Path) -> dict[str, Any]:
    """The options of the command that made a run; empty where none is recorded."""
    import json

    from typer.main import get_command

    from attnopt.cli.main import optimizer

    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        words = shlex.split(report.get("command", ""))
    except (OSError, ValueError, AttributeError):
        return {}
    if "optimize" not in words:
        return {}
    after = words[words.index("optimize") + 1 :]
    context = get_command(optimizer).make_context("optimize", after, resilient_parsing=True)
    return dict(context.params)
