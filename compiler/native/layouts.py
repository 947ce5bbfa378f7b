"""Weights of linear maps as the operators `few_rows` and `many_rows` read them: in panels of 32
outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_PANEL = 32  # outputs
_DEEP = 32  # inputs of a tile
_PARTS = 3  # of bfloat16, that a number of float32 is the sum of


def panels(weights: Sequence[Tensor]) -> Tensor:
    """Weights `[out, in]` float32 for `few_rows`: panels `[in, 32]`, one behind the other, in 16
    bits where all of their values are the same there."""
    short = shorter(_padded(weights))
    made: Tensor = short.unflatten(0, (-1, _PANEL)).transpose(1, 2).flatten(0, 1)
    return made


def tiles(weights: Sequence[Tensor]) -> Tensor:
    """The same for `many_rows`: bfloat16 panels `[in / 32, parts, 2, 16, 32]`, where for every 32
    inputs the parts that values are the sums of follow each other. Of a part, each of two tiles
    holds 16 outputs, in rows of two inputs for every output.
    """
    rest = F.pad(_padded(weights), (0, -weights[0].shape[1] % _DEEP))
    parts = [rest.bfloat16()]
    while len(parts) < _PARTS and bool((rest := rest - parts[-1].float()).any()):
        parts.append(rest.bfloat16())
    apart = torch.stack(parts).unflatten(1, (-1, 2, 16)).unflatten(-1, (-1, 16, 2))
    made: Tensor = apart.permute(1, 4, 0, 2, 5, 3, 6).flatten(-2).flatten(0, 1)
    return made


def biases(given: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor | None:
    """The biases `[out]` of the weights, float32 `[panels * 32]`, of zeros for None; None where all
    are."""
    if all(bias is None for bias in given):
        return None
    return torch.cat([
        F.pad(weight.new_zeros(len(weight)) if bias is None else bias, (0, -len(weight) % _PANEL))
        for bias, weight in zip(given, weights, strict=True)
    ])  # fmt: skip


def paired(gates: Tensor, others: Tensor) -> Tensor:
    """Two weights `[out, in]`, or biases `[out]`, of linear maps of which one gates the other, as
    one whose panels are of the one and the other in turns."""
    parts = [F.pad(x, (0, 0) * (x.dim() - 1) + (0, -len(x) % _PANEL)) for x in (gates, others)]
    return torch.stack([x.unflatten(0, (-1, _PANEL)) for x in parts], 1).flatten(0, 2)


def shorter(weight: Tensor) -> Tensor:
    """The weight in 16 bits, where every value of it is the same there."""
    for dtype in (torch.bfloat16, torch.float16):
        short = weight.to(dtype)
        if torch.equal(short.float(), weight):
            return short
    return weight


def _padded(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([F.pad(weight, (0, 0, 0, -len(weight) % _PANEL)) for weight in weights])
