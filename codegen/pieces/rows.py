"""Tensors of rows, as launchers take and make them: one row of numbers for each token of each head.

A launcher works on the host before every launch, so these ask of torch no more than they need.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_rows(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor whose last dimension is dense (a copy where it is not), and its other strides."""
    strides = tensor.stride()
    if strides[-1] == 1:
        return tensor, strides[:-1]
    tensor = tensor.contiguous()
    return tensor, tensor.stride()[:-1]


def by_token(like: Tensor, batch: int, heads: int, tokens: int, width: int) -> Tensor:
    """Room for `[batch, heads, tokens, width]` in the dtype of another tensor and on its device, in
    memory `[batch, tokens, heads, width]`."""
    size, strides = (batch, heads, tokens, width), (tokens * heads * width, width, heads * width, 1)
    return like.new_empty_strided(size, strides)


def partial_results(out: Tensor, splits: int, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Where `splits` programs each write their part of a result `[batch, heads, tokens, width]`:
    `[splits, batch, heads, tokens, width]` in float32, of one the result itself; and float32
    log-sum-exps `[splits, batch, heads, tokens]`, None where nobody reads them."""
    batch, heads, tokens, width = out.shape
    sums, rows = None, heads * tokens
    if splits > 1 or with_lse:
        size, strides = (splits, batch, heads, tokens), (batch * rows, rows, tokens, 1)
        sums = out.new_empty_strided(size, strides, dtype=torch.float32)
    if splits == 1:
        return out[None], sums
    wide = (splits, batch, heads, tokens, width)
    apart = (batch * rows * width, rows * width, width, heads * width, 1)
    return out.new_empty_strided(wide, apart, dtype=torch.float32), sums
