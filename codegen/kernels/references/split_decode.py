"""What `split_decode` computes, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def split_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, starts: Tensor | None = None,
    table: Tensor | None = None, selected: Tensor | None = None, counts: Tensor | None = None,
    bias: Tensor | None = None, keep: Tensor | None = None, padding: Tensor | None = None,
    sinks: Tensor | None = None, slopes: Tensor | None = None, *, scale: float, causal: bool = True,
    window: bool = False, left: int = 0, sink: int = 0, softcap: float = 0.0, ring: bool = False,
    run: int = 1, k_scale: float = 1.0, v_scale: float = 1.0, score_hook: Any = None,
    keep_hook: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and the log-sum-exps, in the dtype of q. Hooks are plain functions here:
    `keep_hook(batch, head, i, j)` and `score_hook(logits, batch, head, i, j)`."""
    batch, heads, queries = q.shape[:3]
    if table is not None:
        k, v = (x[table.long()].flatten(1, 2).transpose(1, 2) for x in (k, v))
    kv_heads, slots = k.shape[1], k.shape[2]
    group = heads // kv_heads
    k, v = ((x.to(q.dtype) * by).repeat_interleave(group, 1)
            for x, by in ((k, k_scale), (v, v_scale)))  # fmt: skip
    length = torch.full([batch], slots) if lengths is None else lengths.long()
    length = length[:, None, None, None]
    start = 0 if starts is None else starts.long()[:, None, None, None]
    slot = torch.arange(slots)
    i = length - queries + torch.arange(queries)[:, None]
    j = slot.expand(batch, 1, 1, slots)
    if ring:
        j = torch.where(slot < sink, slot, length - 1 - (length - 1 - slot) % max(slots - sink, 1))
    where = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None], i, j
    logits = scale * q @ k.transpose(2, 3)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if slopes is not None:
        logits = logits + slopes.expand(batch, heads)[:, :, None, None] * (j - i)
    if score_hook is not None:
        logits = score_hook(logits, *where)
    if bias is not None:
        logits = logits + bias
    read = (slot < length) & (slot >= start) & ((j <= i) if causal else (i > -slots - 1))
    if window:
        read = read & ((((i - j) < left) & ((j - i) < left)) | (j < start + sink))
    if selected is not None:
        runs = torch.arange(selected.shape[2]).expand(selected.shape)
        listed = runs < (selected.shape[2] if counts is None else counts[..., None])
        named = torch.where(listed, selected.long(), -1)[..., None] == slot // run
        read = read & named.any(2)[:, :, None].repeat_interleave(group, 1)
    for extra in (keep, None if padding is None else padding[:, None, None, :],
                  None if keep_hook is None else keep_hook(*where)):  # fmt: skip
        read = read if extra is None else read & extra
    logits = logits.masked_fill(~read, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.expand(batch, heads, queries, 1).to(logits.dtype)], 3)
    lse = logits.logsumexp(3)
    weights = (logits - lse[..., None].masked_fill(lse.isinf()[..., None], 0.0)).exp()[..., :slots]
    return weights @ v.masked_fill(v.isnan(), 0.0), lse
