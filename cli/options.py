"""The options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_DATA, _FILES, _SIZES = "Data", "Model files", "Sizes"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .pt of a whole module, a .pt2, an ONNX model, a directory of save_pretrained, or "
        "module:callable.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Torch threads to run with (default: torch's choice).")
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, rich_help_panel=_DATA,
        help="Example inputs saved by torch.save: a tensor, a tuple, a dict, or a list of batches.",
    ),
]  # fmt: skip
Text = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, rich_help_panel=_DATA,
        help="Text to measure on, read with the model's tokenizer; encoders take it line by line.",
    ),
]  # fmt: skip
Calibration = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, rich_help_panel=_DATA,
        help="Text to fit rewrites on (default: the first half of --text).",
    ),
]  # fmt: skip
Batch = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=_SIZES, help="Sequences in one call.")
]
Length = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=_SIZES, help="Tokens in one sequence.")
]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="Your own measure of accuracy: called with the model, larger is better.",
    ),
]
AllowGlobal = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=_FILES, metavar="NAME",
        help="A class that the model's pickle may restore, as package.module.Class; repeatable.",
    ),
]  # fmt: skip
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", rich_help_panel=_FILES,
        help="Restore anything the file asks for; it may then run any command.",
    ),
]  # fmt: skip
Attention = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_FILES, metavar="eager|sdpa",
        help="The spelling of attention that a transformers model is read with.",
    ),
]  # fmt: skip

Dtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_FILES, metavar="float32|bfloat16|float16",
        help="What the model is converted to before anything else (default: as it is stored).",
    ),
]  # fmt: skip


def set_threads(threads: int | None) -> None:
    """Run torch with this many threads; None leaves its choice."""
    if threads is None:
        return
    import torch  # here, so that help and mistakes are answered without it

    torch.set_num_threads(threads)


def find_metric(metric: str | None) -> None:
    """Import the user's metric from the current directory, before any work is done."""
    if metric is None:
        return
    from attnopt.autotune.accuracy import load_metric
    from attnopt.compiler.intake.allow import importable_here

    importable_here()
    load_metric(metric)
