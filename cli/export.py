"""`attnopt export DIR --onnx FILE`: a finished run as an ONNX model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnopt.cli import options
from attnopt.cli.stdout import document


def export(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="The folder that optimize or apply wrote, or its plan.json.",
            show_default=False,
        ),
    ],
    onnx: Annotated[Path, typer.Option("--onnx", help="The file to write.", metavar="FILE")],
    opset: Annotated[int, typer.Option(help="The opset: 23 or 24.")] = 23,
    threads: options.Threads = None,
    json: options.Json = False,
) -> int:  # fmt: skip
    """Write the optimized model of DIR as ONNX, its attentions as the operator Attention."""
    from attnopt.cli import draw
    from attnopt.cli.progress import Progress

    with Progress("export", quiet=json) as bar:
        bar("starting torch", 0.0)
        options.set_threads(threads)
        from attnopt.compiler.artifact import program_of
        from attnopt.compiler.onnx.write import write_onnx
        from attnopt.compiler.pipeline import read

        bar("reading the model", 0.1)
        program = read(program_of(folder.parent if folder.name == "plan.json" else folder))
        bar("writing", 0.5)
        written = write_onnx(program, onnx, opset)
    if json:
        document(written.as_json())
        return 0
    draw.line(f"{written.attentions} Attention nodes of opset {written.opset} in {written.path}")
    for reason in written.spelled:
        draw.line(f"written out in other operators: {reason}", "yellow")
    if written.error is None:
        draw.line("not run: onnxruntime is not installed", "yellow")
    else:
        draw.line(f"ONNX Runtime's outputs differ by {written.error:.1e} of their rms")
    return 0
