"""`attnopt apply PLAN MODEL`: the optimized model of a saved plan, without searching."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from attnopt.cli import options
from attnopt.cli.stdout import document


def apply(
    ctx: typer.Context,
    plan: Annotated[Path, typer.Argument(help="A plan.json, or the folder that optimize wrote.")],
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Output folder.", metavar="DIR")],
    inputs: options.Inputs = None,
    allow_global: options.AllowGlobal = None,
    trust: options.Trust = False,
    attention: options.Attention = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> int:
    """Rebuild an optimized model from PLAN, without searching or measuring."""
    from attnopt.cli import draw
    from attnopt.cli.progress import Progress
    from attnopt.compiler.folder import check_writable

    check_writable(out)
    with Progress("apply", quiet=json) as bar:
        bar("starting torch", 0.0)
        options.set_threads(threads)
        from attnopt.autotune.replay import apply as replay

        done = replay(
            plan, model, out=out, inputs=inputs, allow_globals=tuple(allow_global or ()),
            trust=trust, attention=attention, dtype=dtype,
            command=shlex.join(ctx.obj or ["attnopt", "apply", str(plan), model]), progress=bar,
        )  # fmt: skip
    if json:
        document(done.as_json())
        return 0
    draw.outcomes(done.outcomes)
    for warning in done.warnings:
        draw.line(warning, "yellow")
    told = "" if done.warnings else "; the figures in its report are those of the run"
    draw.line(f"saved in {done.folder}{told}")
    return 0
