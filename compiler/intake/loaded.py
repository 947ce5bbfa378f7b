"""`Loaded`: a model that was read, with example inputs it runs on, ready to be traced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.checkpoint import first_line

Kind = Literal["pickle", "export", "onnx", "hf", "callable"]
Task = Literal["causal-lm", "encoder", "seq2seq", "vision", "other"]
_RUN_ERRORS = (
    RuntimeError,
    IndexError,
    ValueError,
    TypeError,
    AssertionError,
    KeyError,
    AttributeError,
)


@dataclass
class Loaded:
    """A model in eval mode and what is known about it.

    `module` is None for an exported program and an ONNX model, `exported` is None for everything
    else. `args` and `kwargs` are real CPU tensors. `weights` is "meta" where there are none, only
    their shapes (see `weightless`): such a model can be inspected and not measured.
    `sequence_dims` maps an input's name to its dimensions that may vary: 0 -> "batch", 1 -> "seq",
    ...; they are hints for the trace. `root_prefix` is "hf." when the module was wrapped, so that
    its parameter names begin with it. `notes` are sentences to say to the user.
    """

    module: nn.Module | None
    exported: torch.export.ExportedProgram | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    kind: Kind
    task: Task = "other"
    tokenizer: Any | None = None
    root_prefix: str = ""
    weights: Literal["real", "meta"] = "real"
    sequence_dims: dict[str, dict[int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The inputs in words: `input_ids int64 [2, 64]`, positional ones numbered."""
    named = [(f"input {i}", value) for i, value in enumerate(args)] + list(kwargs.items())
    return ", ".join(f"{name} {_shape(value)}" for name, value in named) or "no inputs"


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def check_finite(loaded: Loaded, where: str) -> None:
    """Raise `Problem` A108 naming the parameters and buffers that hold NaN; models without
    weights are skipped.
    """
    if loaded.weights == "meta":
        return
    if loaded.exported is not None:
        named = {**loaded.exported.state_dict, **loaded.exported.constants}
    elif loaded.module is not None:
        named = {**dict(loaded.module.named_parameters()), **dict(loaded.module.named_buffers())}
    else:
        named = {}
    broken = [
        name.removeprefix(loaded.root_prefix) for name, value in named.items() if _has_nan(value)
    ]
    if not broken:
        return
    shown = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
    raise Problem(
        "A108",
        f"{len(broken)} of {len(named)} weights hold NaN: {shown}",
        where=where,
        why="nothing measured on such a model would mean anything",
        help="go back to a checkpoint from before the training diverged",
    )


def _has_nan(value: Any) -> bool:
    floating = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    return bool(floating and not value.is_meta and torch.isnan(value).any())


def check_runs(loaded: Loaded, where: str) -> None:
    """Run the model once on its example inputs, without gradients.

    Raises `Problem` A109 that shows the inputs' shapes. Models without weights are skipped.
    """
    if loaded.weights == "meta":
        return
    model = loaded.module if loaded.exported is None else loaded.exported.module(check_guards=True)
    if model is None:
        return
    try:
        with torch.no_grad():
            result = model(*loaded.args, **loaded.kwargs)
    except _RUN_ERRORS as error:
        raise Problem(
            "A109",
            f"the model does not run on its example inputs: {describe(loaded.args, loaded.kwargs)}",
            where=where,
            why=first_line(error),
            help="give inputs that it takes with --inputs FILE (a tuple or a dict of tensors)",
        ) from error
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(result)):
        raise Problem(
            "A109",
            f"the model returns no tensor but {type(result).__name__}",
            where=where,
            help="wrap it in a module that returns tensors, and give that as module.path:callable",
        )


def require_weights(loaded: Loaded) -> None:
    """Raise `Problem` A118 for a model without weights, of which nothing can be measured."""
    if loaded.weights == "meta":
        raise Problem(
            "A118",
            f"{loaded.name} has no weights",
            why="the directory holds a config.json alone, so there is nothing to measure",
            help="put its weights (*.safetensors) beside it; attnopt inspect works without them",
        )
