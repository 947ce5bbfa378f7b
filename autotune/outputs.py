"""A model's outputs as a flat list of tensors, cut to what is real, and how far two differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Batch

Model = Callable[..., Any]

_LIMITS = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}


def call(model: Model, batch: Batch) -> Any:
    """The model's outputs for one batch, without gradients."""
    with torch.no_grad():
        return model(*batch.args, **batch.kwargs)


def tensors(outputs: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists, mappings and dataclass-like outputs, in order."""
    return list(_leaves(outputs))


def floats(outputs: Any) -> list[Tensor]:
    """All floating-point tensors of some outputs, in order."""
    return [tensor for tensor in tensors(outputs) if tensor.is_floating_point()]


def logits(outputs: Any) -> Tensor:
    """The logits `[batch, seq, vocabulary]`: so named, or the first float output of three axes."""
    named = outputs.get("logits") if isinstance(outputs, Mapping) else None
    named = getattr(outputs, "logits", named)
    if isinstance(named, Tensor):
        return named
    found = next((tensor for tensor in floats(outputs) if tensor.dim() == 3), None)
    if found is None:
        raise Problem("A406", "the outputs hold no logits of [batch, seq, vocabulary]",
                      help="measure by --metric module:function instead")  # fmt: skip
    return found


def valid_of(batch: Batch) -> Tensor | None:
    """Which positions are real, bool `[batch, seq]`: by the batch itself or its attention mask."""
    if batch.valid is not None:
        return batch.valid.bool()
    mask = batch.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point():
        return mask.bool()
    return None


def real(tensor: Tensor, valid: Tensor | None) -> Tensor:
    """The entries at real positions of a tensor `[batch, seq, ...]`; all of any other."""
    if valid is None or tuple(tensor.shape[:2]) != tuple(valid.shape):
        return tensor
    return tensor[valid.to(tensor.device)]


def shapes(outputs: Any) -> list[tuple[int, ...]]:
    """The shapes of the floating-point outputs, in order."""
    return [tuple(tensor.shape) for tensor in floats(outputs)]


def difference(actual: Any, expected: Any, valid: Tensor | None = None) -> float:
    """The largest relative Frobenius distance over the floating outputs; inf where shapes differ.

    Only real positions count. NaN on either side gives inf.
    """
    if shapes(actual) != shapes(expected):
        return math.inf
    worst = 0.0
    for mine, theirs in zip(floats(actual), floats(expected), strict=True):
        a, b = real(mine, valid).double(), real(theirs, valid).double()
        if not a.numel():
            continue
        gap = (a - b).norm().item() / max(b.norm().item(), 1e-30)
        worst = max(worst, gap if math.isfinite(gap) else math.inf)
    return worst


def same_within(outputs: Sequence[Tensor]) -> float:
    """The relative distance up to which two runs of one function agree, by the coarsest dtype."""
    return max((_LIMITS.get(tensor.dtype, 5e-2) for tensor in outputs), default=0.0)


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif hasattr(value, "__dict__"):
        yield from _leaves(list(vars(value).values()))
