"""Read a `.pt` file that holds a whole module; anything else in it is answered with what to do
instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.checkpoint import load_checkpoint

_BUILDER = (
    "save the whole module, torch.save(model, path), or write a function that builds the model and "
    "loads these weights, and give it as module.path:function"
)


def read_module(
    path: Path, allow_globals: Sequence[str] = (), *, trust: bool = False
) -> tuple[nn.Module, tuple[str, ...]]:
    """The module in the file, in eval mode, and what to tell the user about how it was found.

    Raises `Problem` A106 for a state dict or any other object, and those of `load_checkpoint`.
    """
    value = load_checkpoint(path, allow_globals, trust=trust)
    if isinstance(value, nn.Module):
        return _ready(value, path), ()
    modules = (
        {key: item for key, item in value.items() if isinstance(item, nn.Module)}
        if isinstance(value, dict)
        else {}
    )
    if len(modules) == 1:
        key, module = next(iter(modules.items()))
        return _ready(module, path), (f"the model is the entry {key!r} of the file",)
    raise _not_a_module(value, path)


def _ready(module: nn.Module, path: Path) -> nn.Module:
    try:
        return module.eval()
    except (AttributeError, TypeError) as error:
        raise Problem(
            "A107",
            f"the {type(module).__name__} in the file is not complete",
            where=str(path),
            why=str(error),
            help="save it again with the versions installed here",
        ) from error


def _not_a_module(value: Any, path: Path) -> Problem:
    weights = _weights(value)
    if weights:
        named = ", ".join(list(weights)[:3])
        what = (
            f"the file holds {len(weights)} weights ({named}, ...) but no model: a bare state dict"
        )
        return Problem("A106", what, where=str(path), help=_BUILDER)
    return Problem(
        "A106",
        f"the file holds a {type(value).__name__}, not a module",
        where=str(path),
        help=_BUILDER,
    )


def _weights(value: Any) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, also where it is one entry of a training checkpoint."""
    if not isinstance(value, dict):
        return {}
    tensors = {key: item for key, item in value.items() if isinstance(item, torch.Tensor)}
    nested = (_weights(item) for item in value.values() if isinstance(item, dict))
    return tensors or max(nested, key=len, default={})
