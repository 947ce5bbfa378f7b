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
    size = (batch, heads, tokens, width)
    return torch.empty_permuted(size, (0, 2, 1, 3), dtype=like.dtype, device=like.device)


def partial_results(out: Tensor, splits: int, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Where `splits` programs each write their part of a result `[batch, heads, tokens, width]`:
    `[splits, batch, heads, tokens, width]` in float32, of one the result itself; and float32
    log-sum-exps `[splits, batch, heads, tokens]`, None where nobody reads them."""
    batch, heads, tokens, width = out.shape
    sums = None
    if splits > 1 or with_lse:
        sums = torch.empty(splits, batch, heads, tokens, dtype=torch.float32, device=out.device)
    if splits == 1:
        return out[None], sums
    size = (splits, batch, heads, tokens, width)
    order = (0, 1, 3, 2, 4)
    return torch.empty_permuted(size, order, dtype=torch.float32, device=out.device), sums
