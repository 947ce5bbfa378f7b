"""Linear maps through a root-mean-square norm that is there and not wanted.

A norm divides a vector by its length. Let z = (s c, M), with c the numbers that are to pass and M a
constant much larger than s |c|. Then

    rms(z) = sqrt((M^2 + s^2 |c|^2) / n + eps) = level (1 + s^2 |c|^2 / (2 M^2) + ...),

so the norm divides by the constant `level`, which the map after it multiplies by, and errs by half
of (s |c| / M)^2 at most. With |c| <= bound for every input, s makes that 1.2e-10 or less, and 8e-6
in float16, whose numbers cannot be as small; both are far below a rounding of the dtype. The
constant passes too, as a 1 that biases are made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_CONSTANT = 32768.0  # M, which every dtype holds exactly
_SHARE, _SHARE_HALF = 2.0**-16, 2.0**-8  # s |c| / M at most
_EPS = 1e-6  # of the norms on latents, in all versions


@dataclass(frozen=True)
class Unnormed:
    """A map before the norm (`weight` `[size, width]`, `bias` `[size]`), the norm's weight `gamma`
    `[size]`, and the map after it, `after` `[channels, size]`; float64."""

    weight: Tensor
    bias: Tensor
    gamma: Tensor
    after: Tensor


def unnormed(down: Tensor, up: Tensor, size: int, bound: float, dtype: torch.dtype) -> Unnormed:
    """Make `up` `[channels, rank + 1]` of (`down` x, 1), with a norm of `size` > rank in between.

    `down` is `[rank, width]` and |down x| <= `bound` for all x. Everything that depends on the data
    is scaled by powers of two, which no dtype rounds.
    """
    rank, width = down.shape
    share = _SHARE_HALF if dtype is torch.float16 else _SHARE
    scale = _power(_CONSTANT * share / max(bound, 1e-30), math.floor)
    level = math.sqrt(_CONSTANT**2 / size + _EPS)
    gamma = torch.ones(size, dtype=torch.float64)
    # What is cached is of the usual magnitude, and the factor in the range of float16.
    gamma[:rank] = _power(min(level / scale, 2.0**14), round)
    gamma[-1] = _power(level / _CONSTANT, round)
    weight, bias = down.new_zeros(size, width), down.new_zeros(size)
    weight[:rank], bias[-1] = down * scale, _CONSTANT
    after = up.new_zeros(len(up), size)
    after[:, :rank] = up[:, :-1] * (level / scale) / gamma[0]
    after[:, -1] = up[:, -1] * (level / _CONSTANT) / gamma[-1]
    return Unnormed(weight, bias, gamma, after)


def longest(down: Tensor, norm: Tensor) -> float:
    """The largest |down x| for x that comes out of a root-mean-square norm with this weight
    `[width]`: |x / weight| is at most sqrt(width). 0 for a map to nothing."""
    if not len(down):
        return 0.0
    scaled = down * norm.double()
    square = scaled @ scaled.T if len(scaled) < scaled.shape[1] else scaled.T @ scaled
    return math.sqrt(float(torch.linalg.eigvalsh(square)[-1].clamp(min=0)) * down.shape[1])


def _power(value: float, rounding: Callable[[float], int]) -> float:
    """The power of two near a value."""
    return math.ldexp(1.0, rounding(math.log2(value)))
