"""`attnopt inspect MODEL`: every attention of a model, with its facts or why it was left alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnopt.cli import options
from attnopt.cli.stdout import document
from attnopt.compiler.errors import NothingFound
from attnopt.compiler.whole_file import check_place, write_whole

if TYPE_CHECKING:
    from attnopt.compiler.inspect import Inspection
    from attnopt.compiler.why import Explanation


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
    lock: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the attentions and their fingerprints, for `attnopt check --lock FILE`.",
        ),
    ] = None,
    dot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the model's attentions as a graphviz file."),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the model's attentions as an SVG.")
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

    coverage = 0.0 if require_coverage is None else parse_coverage(require_coverage)
    for path in filter(None, (lock, dot, svg, html)):
        check_place(path)
    with Progress("inspect", quiet=json) as bar:
        bar("starting torch", 0.0)
        options.set_threads(threads)
        from attnopt.compiler.inspect import inspect as look

        found = look(
            model, time=time and why is None, diagnose=diagnose or html is not None,
            inputs=inputs, text=text, batch=batch, length=length,
            allow_globals=tuple(allow_global or ()), trust=trust, attention=attention, dtype=dtype,
            progress=bar,
        )  # fmt: skip
    problem = _short(found, coverage)
    _write(found, dot, svg, html)
    if lock is not None and problem is None:
        form = {"attention": attention, "dtype": dtype, "batch": batch, "length": length}
        _lock(found, lock, form)
    if why is not None and require_coverage is None and lock is None:
        problem = None  # that the question is answered is all that was asked
    told = found if why is None else _explained(found, why)
    if json:
        document(told.as_json() | ({"error": problem.as_json()} if problem is not None else {}))
        return 0 if problem is None else problem.exit_code
    _draw(told)
    if problem is not None:
        raise problem
    return 0


def _short(found: Inspection, coverage: float) -> NothingFound | None:
    """The problem, where too little was understood."""
    from attnopt.autotune.optimize import require_sites

    try:
        require_sites(found.program, coverage)
    except NothingFound as problem:
        return problem
    return None


def _write(found: Inspection, dot: Path | None, svg: Path | None, html: Path | None) -> None:
    if html is not None and found.diagnostics is not None:
        from attnopt.autotune.diagnostics_page import page

        write_whole(html, page(found.program.name, found.diagnostics))
    if dot is None and svg is None:
        return
    from attnopt.compiler import drawing_dot, drawing_svg
    from attnopt.compiler.drawing import drawing

    drawn = drawing(found)
    if dot is not None:
        write_whole(dot, drawing_dot.dot(drawn))
    if svg is not None:
        write_whole(svg, drawing_svg.svg(drawn))


def _lock(found: Inspection, path: Path, form: dict[str, Any]) -> None:
    from attnopt.compiler.lock import lock

    write_whole(path, lock(found, form).text)


def _explained(found: Inspection, wanted: str) -> Explanation:
    from attnopt.compiler.why import explain

    return explain(found, wanted)


def _draw(found: Inspection | Explanation) -> None:
    from attnopt.cli import draw, draw_why
    from attnopt.compiler.inspect import Inspection

    if not isinstance(found, Inspection):
        draw_why.explanation(found)
        return
    if found.sites:
        draw.sites(found.sites)
    draw.sublayers(found.sublayers)
    told = found.as_json()
    draw.decoding(told["decoding"])
    draw.model(told)
    if found.diagnostics is not None:
        from attnopt.cli.draw_diagnosis import diagnosis

        diagnosis(found.diagnostics)
