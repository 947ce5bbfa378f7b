"""`attnopt inspect MODEL`: every attention of a model, with its facts or why it was left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnopt.cli import options
from attnopt.cli.stdout import document
from attnopt.compiler.errors import NothingFound

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
    why: Annotated[
        str | None,
        typer.Option(
            metavar="SITE",
            help="Explain one attention at its source line: an id (s0, u0) or a module path.",
        ),
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

    coverage = 0.0 if require_coverage is None else parse_coverage(require_coverage)
    with Progress("inspect", quiet=json) as bar:
        bar("starting torch", 0.0)
        options.set_threads(threads)
        from attnopt.autotune.optimize import require_sites
        from attnopt.compiler.inspect import inspect as look

        found = look(
            model, time=time and why is None, inputs=inputs, text=text, batch=batch, length=length,
            allow_globals=tuple(allow_global or ()), trust=trust, attention=attention, dtype=dtype,
            progress=bar,
        )  # fmt: skip
    if why is not None:
        return _explain(found, why, json)
    if json:
        return _document(found, coverage)
    _draw(found)
    require_sites(found.program, coverage)
    return 0


def _explain(found: Inspection, wanted: str, json: bool) -> int:
    """Answer `--why`; that it was answered is success, whatever the answer."""
    from attnopt.cli.draw_why import explanation
    from attnopt.compiler.why import explain

    told = explain(found, wanted)
    if json:
        document(told.as_json())
    else:
        explanation(told)
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
