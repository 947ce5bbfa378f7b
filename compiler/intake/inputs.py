"""Example inputs: read from a file, bound to the model's argument names, with hints which
dimensions may vary.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.checkpoint import load_checkpoint
from attnopt.compiler.intake.detect import Kind, detect

Batch = tuple[tuple[Any, ...], dict[str, Any]]
_LAYOUT = (
    "save one tensor, a tuple of positional inputs, a dict of inputs by name, "
    "a pair (tuple, dict), or a list of such batches"
)


def load_batches(path: Path) -> list[Batch]:
    """Read `--inputs FILE`: one batch, or a list of them, each as `(args, kwargs)`.

    Only tensors and plain containers are restored; names beyond those are refused (`Problem` A102).
    Raises A110 where the layout is none of the known ones.
    """
    if detect(path) not in (Kind.TORCH_ZIP, Kind.TORCH_LEGACY):
        raise Problem("A110", "the inputs are not a torch.save file", where=str(path), help=_LAYOUT)
    value = load_checkpoint(path, tensors_only=True)
    batches = value if isinstance(value, list) else [value]
    if not batches:
        raise Problem("A110", "the inputs are an empty list", where=str(path), help=_LAYOUT)
    return [as_batch(batch, str(path)) for batch in batches]


def as_batch(value: Any, where: str) -> Batch:
    """One batch in any of the layouts as `(args, kwargs)`. Raises `Problem` A110 or A111 (an empty
    tensor).
    """
    args, kwargs = _split(value, where)
    tensors = [
        leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
    ]
    if not tensors:
        raise Problem("A110", "the inputs hold no tensor", where=where, help=_LAYOUT)
    if all(tensor.dim() == 0 for tensor in tensors) or any(
        tensor.numel() == 0 for tensor in tensors
    ):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise Problem(
            "A111",
            f"the example inputs are empty or have no dimensions: {shapes}",
            where=where,
            help="give a real batch with --inputs FILE",
        )
    return args, kwargs


def _split(value: Any, where: str) -> Batch:
    if isinstance(value, torch.Tensor):
        return (value,), {}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise Problem("A110", "the inputs' names are not strings", where=where, help=_LAYOUT)
        return (), dict(value)
    if not isinstance(value, tuple):
        raise Problem("A110", f"the inputs are a {type(value).__name__}", where=where, help=_LAYOUT)
    pair = len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], dict)
    return (value[0], dict(value[1])) if pair else (value, {})


def missing(where: str) -> Problem:
    """The `Problem` A111 for a model whose inputs cannot be guessed."""
    return Problem(
        "A111",
        "this model needs example inputs",
        where=where,
        why="they can be made up only for models that come with a known configuration",
        help=f"--inputs FILE; {_LAYOUT}",
    )


def varying(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, dict[int, str]]:
    """Which dimensions of the inputs probably vary, by the names of `forward`.

    Integers `[batch, seq]` and floats `[batch, seq, width]` are taken as sequences; every other
    tensor only as a batch.
    """
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError:
        return {}
    return {
        name: _dims(value)
        for name, value in bound.arguments.items()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    }


def _dims(value: torch.Tensor) -> dict[int, str]:
    words = value.dim() == 2 and not value.is_floating_point()
    vectors = value.dim() == 3 and value.is_floating_point()
    return {0: "batch", 1: "seq"} if words or vectors else {0: "batch"}
