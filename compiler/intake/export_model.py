"""Read a `.pt2` file: look through it, then `torch.export.load`, then find its example inputs and
varying sizes.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.archive import open_archive
from attnopt.compiler.intake.checkpoint import LOAD_ERRORS, first_line
from attnopt.compiler.intake.export_scan import mentions, scan_export
from attnopt.compiler.intake.inputs import Batch, missing
from attnopt.compiler.intake.loaded import Loaded

_OWN_OPS = "attnopt.compiler.ops"


def load_export(
    path: Path,
    batch: Batch | None = None,
    allow_globals: Sequence[str] = (),
    *,
    trust: bool = False,
) -> Loaded:
    """Load an exported program; its saved example inputs are used unless others are given.

    Raises `Problem` A102, A103, A104 (see `export_scan`), A107 (torch cannot load it) or A111 (no
    inputs).
    """
    where = str(path)
    with open_archive(path, path.stat().st_size, where) as archive:
        if mentions(archive, "torch.ops.attnopt.", where):
            importlib.import_module(_OWN_OPS)
        if not trust:
            scan_export(archive, where, allow_globals)
    program = _load(path, where)
    args, kwargs = batch if batch is not None else _saved_inputs(program, where)
    return Loaded(
        module=None,
        exported=program,
        args=args,
        kwargs=kwargs,
        name=path.stem,
        kind="export",
        sequence_dims=symbolic_dims(program),
        notes=() if batch is not None else ("example inputs are those saved with the program",),
    )


def _load(path: Path, where: str) -> torch.export.ExportedProgram:
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the loader reports a failure as a warning with a stack trace
    try:
        with warnings.catch_warnings(), path.open("rb") as stream:
            warnings.simplefilter("ignore", UserWarning)
            return torch.export.load(stream)
    except LOAD_ERRORS as error:
        raise Problem(
            "A107",
            "torch could not load the exported program",
            where=where,
            why=first_line(error),
            help=f"export it again with torch {torch.__version__}",
        ) from error
    finally:
        logger.setLevel(level)


def _saved_inputs(program: torch.export.ExportedProgram, where: str) -> Batch:
    if program.example_inputs is None:
        raise missing(where)
    args, kwargs = program.example_inputs
    return tuple(args), dict(kwargs)


def symbolic_dims(program: torch.export.ExportedProgram) -> dict[str, dict[int, str]]:
    """The sizes that the program leaves open: input name -> {dimension: name of its symbol}."""
    users = {
        spec.arg.name: None
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    }
    values: dict[str, Any] = {
        node.name: node.meta.get("val")
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in users
    }
    return {
        name: {dim: str(size) for dim, size in enumerate(leaf.shape) if not isinstance(size, int)}
        for name, value in values.items()
        for leaf in pytree.tree_leaves(value)
        if isinstance(leaf, torch.Tensor)
    }
