"""`attnopt codegen DIR`: the attentions of a finished run as Triton kernels for one target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnopt.cli import options
from attnopt.cli.stdout import document

if TYPE_CHECKING:
    from attnopt.autotune.generate import Generated


def codegen(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="The folder that optimize or apply wrote, or its plan.json.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="The GPU to write for (h100, mi300x, ...), a .toml, or cpu.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output folder.", metavar="DIR", show_default=False)],
    aot: Annotated[
        bool,
        typer.Option("--aot/--no-aot", help="Compile the kernels ahead of time (default)."),
    ] = True,
    package: Annotated[
        bool,
        typer.Option("--package", help="Also write the whole model as an AOTInductor package."),
    ] = False,
    batch: options.Batch = None,
    length: options.Length = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="bfloat16|float16|float32",
            help="What the kernels are compiled for (default: what the model computes in).",
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            metavar="ieee|tf32",
            help="Of products in float32: exact, or of operands rounded to tf32.",
        ),
    ] = "ieee",
    threads: options.Threads = None,
    json: options.Json = False,
) -> int:  # fmt: skip
    """Write kernels for the attentions of DIR as modules that need no attnopt, and as binaries."""
    from attnopt.cli.progress import Progress

    with Progress("codegen", quiet=json) as bar:
        bar("starting torch", 0.0)
        options.set_threads(threads)
        from attnopt.autotune.generate import generate

        made = generate(
            run, out, target, batch=batch, length=length, dtype=dtype, aot=aot,
            with_package=package, precision=precision, progress=bar,
        )  # fmt: skip
    if json:
        document(made.as_json())
        return 0
    _draw(made)
    return 0


def _draw(made: Generated) -> None:
    from attnopt.cli import draw

    for one in made.built:
        sites = ", ".join(each.title for each in made.placed if each.module == one.name)
        draw.line(f"{one.name}.py: {one.picked.spec.text} at {sites}")
        for launch in one.launches:
            used, limit = launch.resources, made.target.shared_per_block
            draw.line(
                f"  {launch.file}: {used.registers} registers, {used.spills} bytes spilled, "
                f"{used.shared} of {limit} bytes of shared memory"
            )
        for wrong in one.misfits:
            draw.line(f"  {wrong}: slower than it could be", "yellow")
    for each in made.placed:
        if each.why_not:
            draw.line(f"no kernel for {each.title}: {each.why_not}", "yellow")
    if made.document["package"]:
        draw.line(f"{made.document['package']}: the whole model, for torch to load")
    draw.line(f"saved in {made.folder}")
