"""`attnopt inspect MODEL`: every attention of a model, with its facts or why it was left alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnopt.cli import options
from attnopt.cli.stdout import document
from attnopt.compiler.errors import NothingFound, Problem

if TYPE_CHECKING:
    from attnopt.compiler.inspect import Inspection


def inspect(
    model: options.Model,
    time: Annotated[
        bool, typer.Option("--time/--no-time", help="Measure each attention's share of the time.")
    ] = True,
    require_coverage: Annotated[
        str | None,
        typer.Option(
            help="Exit with 3 when a smaller share of the attentions is understood: 100%."
        ),
    ] = None,
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Measure on data what every head and sublayer does.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write the diagnostics as one page; implies --diagnose."),
    ] = None,
    text: options.Text = None,
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
    """List every attention of MODEL with its facts; needs no weights."""
    from attnopt.autotune.request import parse_coverage
    from attnopt.cli.progress import Progress

    if html is not None and not html.parent.is_dir():
        raise Problem(
            "A416", "the page cannot be written", where=str(html), why="there is no such folder"
        )
    coverage = 0.0 if require_coverage is None else parse_coverage(require_coverage)
    with Progress("inspect", quiet=json) as bar:
        bar("starting torch", 0.0)
        options.set_threads(threads)
        from attnopt.autotune.optimize import require_sites
        from attnopt.compiler.inspect import inspect as look

        found = look(
            model, time=time, diagnose=diagnose or html is not None,
            inputs=inputs, text=text, batch=batch, length=length,
            allow_globals=tuple(allow_global or ()), trust=trust, attention=attention, dtype=dtype,
            progress=bar,
        )  # fmt: skip
        if html is not None and found.diagnostics is not None:
            from attnopt.autotune.diagnostics_page import write

            write(html, found.program.name, found.diagnostics)
    if json:
        return _document(found, coverage)
    _draw(found)
    require_sites(found.program, coverage)
    return 0


def _document(found: Inspection, coverage: float) -> int:
    """The rows, and the problem beside them when too little was understood."""
    from attnopt.autotune.optimize import require_sites

    told: dict[str, Any] = found.as_json()
    code = 0
    try:
        require_sites(found.program, coverage)
    except NothingFound as problem:
        told, code = {**told, "error": problem.as_json()}, problem.exit_code
    document(told)
    return code


def _draw(found: Inspection) -> None:
    from attnopt.cli import draw

    if found.sites:
        draw.sites(found.sites)
    draw.sublayers(found.sublayers)
    draw.model(found.as_json())
    if found.diagnostics is not None:
        from attnopt.cli.draw_diagnosis import diagnosis

        diagnosis(found.diagnostics)
