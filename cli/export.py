"""`attnopt export DIR`: a finished run as an ONNX model, or as a checkpoint of transformers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from attnopt.cli import options
from attnopt.cli.stdout import document
from attnopt.compiler.errors import Problem


def export(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="The folder that optimize or apply wrote, or its plan.json.",
            show_default=False,
        ),
    ],
    onnx: Annotated[
        Path | None, typer.Option("--onnx", help="The ONNX file to write.", metavar="FILE")
    ] = None,
    hf: Annotated[
        Path | None,
        typer.Option("--hf", metavar="OUT", help="The folder of a transformers model to write."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="The original model, for --hf (default: the one of the run)."
        ),
    ] = None,
    opset: Annotated[
        int | None, typer.Option(help="The opset of the ONNX file: 23 (default) or 24.")
    ] = None,
    trust: options.Trust = False,
    attention: options.Attention = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> int:  # fmt: skip
    """Write the optimized model of DIR as ONNX, or as a plain checkpoint of its family."""
    if (onnx is None) == (hf is None):
        raise Problem(
            "A610", "Give --onnx FILE or --hf OUT" + ("" if onnx is None else ", not both"),
            help="attnopt export --help lists the options",
        )  # fmt: skip
    other = "--onnx" if hf is not None else "--hf"
    given = (
        {"--opset": opset} if hf is not None
        else {"--model": model, "--trust": trust or None, "--attention": attention,
              "--dtype": dtype}
    )  # fmt: skip
    vain = [name for name, value in given.items() if value is not None]
    if vain:
        raise Problem("A610", f"{', '.join(vain)} can be given with {other} only")
    home = folder.parent if folder.name == "plan.json" else folder
    if hf is not None:
        form = {"attention": attention, "dtype": dtype}
        return _checkpoint(home, hf, model, form, trust, threads, json)
    assert onnx is not None
    return _onnx(home, onnx, 23 if opset is None else opset, threads, json)


def _onnx(home: Path, onnx: Path, opset: int, threads: int | None, json: bool) -> int:
    from attnopt.cli import draw
    from attnopt.cli.progress import Progress

    with Progress("export", quiet=json) as bar:
        bar("starting torch", 0.0)
        options.set_threads(threads)
        from attnopt.compiler.artifact import program_of
        from attnopt.compiler.onnx.write import write_onnx
        from attnopt.compiler.pipeline import read

        bar("reading the model", 0.1)
        program = read(program_of(home))
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


def _checkpoint(
    home: Path, out: Path, model: Path | None, form: dict[str, str | None], trust: bool,
    threads: int | None, json: bool,
) -> int:  # fmt: skip
    from attnopt.cli import draw
    from attnopt.cli.progress import Progress

    with Progress("export", quiet=json) as bar:
        bar("starting torch", 0.0)
        options.set_threads(threads)
        from attnopt.autotune.checkpoint import export_checkpoint

        source, form = _as_then(home, model, form)
        made = export_checkpoint(home, out, source, trust=trust, progress=bar, **form)
    if json:
        document(made.as_json())
        return 0
    draw.line(f"{made.family} in {made.folder}, for transformers to load")
    for name, (was, now) in made.settings.items():
        draw.line(f"{name}: {was} -> {now}")
    for module in made.zeroed:
        draw.line(f"{module} is zero: its block stays, so this is exact and no faster", "yellow")
    for module, (own, all_) in made.padded.items():
        draw.line(f"{module} keeps {own} heads, filled up with zeros to {all_}", "yellow")
    if made.kept:
        draw.line(f"not in a checkpoint, since they change no function: {', '.join(made.kept)}")
    was, now = made.parameters
    draw.line(f"{was:,} -> {now:,} weights in {made.dtype}")
    draw.line(f"reloaded, its outputs differ by {made.error:.1e} of their rms from the run's")
    return 0


def _as_then(
    home: Path, model: Path | None, form: dict[str, str | None]
) -> tuple[Path, dict[str, Any]]:
    """The original's folder and the form it is read in: as given, else as in the run."""
    from attnopt.cli.recorded import recorded

    then = recorded(home)
    form = {key: then.get(key) if value is None else value for key, value in form.items()}
    named = model or then.get("model")
    if model is None and (named is None or not Path(named).is_dir()):
        raise Problem(
            "A612", "the folder of the original model is needed", where=str(home),
            why=f"the run was made from {named}, which is no folder here" if named else "",
            help=f"attnopt export {shlex.quote(str(home))} --hf OUT --model FOLDER",
        )  # fmt: skip
    return Path(str(named)), form
