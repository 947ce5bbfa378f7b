"""The softmax that never sees a whole row (Milakov and Gimelshein, 2018; FlashAttention-2, Dao
2023, algorithm 1): running maximum, sum and weighted values in base 2.

Logits are multiplied by log2(e) beforehand, so that exp2, which the hardware has, is enough. The
running maximum starts at a finite floor: a row without any key then has a sum of zero, not NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR: tl.constexpr = tl.constexpr(-1.0e30)
# Above it are the logits of keys; below, a row whose every key has a bias of the lowest number.
NEVER: tl.constexpr = tl.constexpr(-1.0e28)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def weigh(top, total, logits, factor):
    """The running maximum and sum after one tile of keys, what is left of the values before it, and
    the tile's weights; arguments as `absorb` has them."""
    higher = tl.maximum(top, tl.max(logits, 1) * factor)
    kept = tl.exp2(top - higher)
    weights = tl.exp2(logits * factor - higher[:, None])
    return higher, total * kept + tl.sum(weights, 1), kept, weights


@triton.jit
def absorb(top, total, out, logits, factor, v, PRECISION: tl.constexpr):
    """Add one tile of keys. `top`, `total` [M] and `out` [M, V] are float32; `logits` [M, N] times
    the positive `factor` are in base 2, -inf where a key is not read; `v` [N, V]."""
    higher, total, kept, weights = weigh(top, total, logits, factor)
    out = tl.dot(weights.to(v.dtype), v, out * kept[:, None], input_precision=PRECISION)
    return higher, total, out


@triton.jit
def soft_cap(logits, cap):
    """cap * tanh(logits / cap), in a spelling that every target has."""
    return cap * (2.0 / (1.0 + tl.exp2(logits * (-2.0 * LOG2E) / cap)) - 1.0)


@triton.jit
def finish(top, total, out):
    """The output [M, V] and the natural log-sum-exp [M]: zeros and -inf for a row without a key."""
    some = total > 0
    safe = tl.where(some, total, 1.0)
    lse = tl.where(some, top * LN2 + tl.log(safe), float("-inf"))
    return out / safe[:, None], lse
