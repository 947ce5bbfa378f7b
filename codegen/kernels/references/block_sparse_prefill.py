"""What `block_sparse_prefill` computes, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def block_sparse_prefill(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, partial: Tensor, columns: Tensor,
    pattern_of: Tensor, spans: Tensor | None = None, order: Tensor | None = None, offset: int = 0,
    *, scale: float, causal: bool = True, query_block: int, key_block: int, softcap: float = 0.0,
    keep_hook: Any = None, score_hook: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and the log-sum-exps, in the dtype of the inputs. Hooks are plain functions here:
    `keep_hook(batch, head, i, j)` and `score_hook(logits, batch, head, i, j)`."""
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    i = torch.arange(offset, offset + queries)[:, None]
    j = torch.arange(keys)[None, :]
    where = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None], i, j

    listed = torch.zeros(2, *partial.shape, -(-keys // key_block), dtype=torch.bool)
    for pattern, row in torch.cartesian_prod(*map(torch.arange, partial.shape)).tolist():
        first, middle, last = starts[pattern, row], partial[pattern, row], starts[pattern, row + 1]
        listed[0, pattern, row, columns[first:middle].long()] = True
        listed[1, pattern, row, columns[middle:last].long()] = True
    listed = listed.repeat_interleave(query_block, 2).repeat_interleave(key_block, 3)
    share = heads // pattern_of.shape[-1]
    of_head = pattern_of.expand(batch, -1).long().repeat_interleave(share, 1)
    whole, cut = listed[:, :, :queries, :keys][:, of_head]  # [batch, heads, S, T] each
    if causal:
        cut = cut & (j <= i)
    if spans is not None:
        left, sink = spans.long()[of_head][..., None, None].unbind(2)
        cut = cut & (((i - j < left) & (j - i < left)) | (j < sink))
    if keep_hook is not None:
        cut = cut & keep_hook(*where)

    logits = scale * q @ k.transpose(2, 3)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if score_hook is not None:
        logits = score_hook(logits, *where)
    logits = logits.masked_fill(~(whole | cut), float("-inf"))
    lse = logits.logsumexp(3)
    weights = (logits - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return weights @ v, lse
