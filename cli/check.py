"""`attnopt check DIR`: measure a finished run again, and fail when it is out of bounds."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from attnopt.cli import options
from attnopt.cli.recorded import TEXTS, recorded
from attnopt.cli.stdout import document
from attnopt.compiler.errors import Problem

NOT_MET = 2


def check(
    folder: Annotated[
        Path | None, typer.Argument(help="The folder that optimize wrote.", metavar="DIR")
    ] = None,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="The original model (default: the one of the run)."),
    ] = None,
    lock: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Compare MODEL with what `inspect --lock` wrote, in place of a run in DIR.",
        ),
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
    """Measure the run in DIR again, or compare MODEL with a lock; exit 2 when it does not hold."""
    from attnopt.autotune.request import parse_budget, parse_share
    from attnopt.cli import draw
    from attnopt.cli.progress import Progress

    if lock is not None:
        from attnopt.cli.check_lock import check_lock, refuse

        run = {"min_speed": min_speed, "max_drop": max_drop, "metric": metric,
               "calibration": calibration}  # fmt: skip
        refuse(run, both=model is not None)
        reading = {"inputs": inputs, "text": text, "trust": trust,
                   "allow_globals": tuple(allow_global or ())}  # fmt: skip
        held = check_lock(
            lock, None if folder is None else str(folder), reading,
            {"attention": attention, "dtype": dtype, "batch": batch, "length": length},
            threads=threads, json=json,
        )  # fmt: skip
        return 0 if held else NOT_MET
    if folder is None:
        raise Problem(
            "A610", "Missing argument 'DIR'", help="attnopt check --help lists the options"
        )
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
    with Progress("check", quiet=json) as bar:
        bar("starting torch", 0.0)
        options.set_threads(threads)
        from attnopt.autotune.check import check as measure

        original, asked = _as_then(folder, model, given, form)
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
    then = recorded(folder)
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
    return str(named), {**_merged(data, then), **form}


def _merged(data: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """The data options, each as given or else as recorded; tensors take the place of text and its
    sizes, and text that of tensors."""
    given = {key: value for key, value in data.items() if value is not None}
    stale = set[str]()
    if "inputs" in given:
        stale = {*TEXTS, "batch", "length"}
    elif given.keys() & TEXTS:
        stale = {"inputs"}
    taken = {key: then.get(key) for key in data.keys() - given.keys() - stale}
    for key in (*TEXTS, "inputs"):
        path = taken.get(key)
        if path is not None and not path.is_file():
            raise Problem(
                "A613",
                f"the file that the run read as --{key} is not here",
                where=str(path),
                why="" if path.is_absolute() else f"it is looked for from {Path.cwd()}",
                help=f"give --{key} FILE, or go to the directory that the run was started in",
            )
    return {**dict.fromkeys(data), **taken, **given}
