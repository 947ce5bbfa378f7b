"""One tile of a matrix product, as large as is asked for: what spills, and what does not fit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product(x, y, out, M: tl.constexpr, K: tl.constexpr, BROKEN: tl.constexpr):
    m = tl.arange(0, M)
    k = tl.arange(0, K)
    left = tl.load(x + m[:, None] * K + k[None, :])
    right = tl.load(y + k[:, None] * M + m[None, :])
    if BROKEN:
        right = right + tl.arange(0, 2 * M)[None, :]
    tile = tl.dot(left, right)
    tile = tile / tl.sum(tl.sum(tile, 1), 0)  # so that no part of it can be stored early
    tl.store(out + m[:, None] * M + m[None, :], tile)


def product(x: Tensor, y: Tensor, broken: bool = False, warps: int = 4) -> Tensor:
    """x [M, K] times y [K, M] over the sum of all, both in powers of two, in float32."""
    out = torch.empty(x.shape[0], y.shape[1], dtype=torch.float32, device=x.device)
    _product[(1,)](x, y, out, M=x.shape[0], K=x.shape[1], BROKEN=broken, num_warps=warps)
    return out
