"""What `split_decode` computes, in plain torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.kernels.references.masked_logits import masked_logits


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
    k, v = k.to(q.dtype) * k_scale, v.to(q.dtype) * v_scale
    slots, group = k.shape[2], heads // k.shape[1]
    length = torch.full([batch], slots) if lengths is None else lengths.long()
    length = length[:, None, None, None]
    start = 0 if starts is None else starts.long()[:, None, None, None]
    slot = torch.arange(slots)
    j = slot.expand(batch, 1, 1, slots)
    if ring:
        j = torch.where(slot < sink, slot, length - 1 - (length - 1 - slot) % max(slots - sink, 1))
    if slopes is not None:
        score_hook = partial(_sloped, slopes.expand(batch, heads)[:, :, None, None])
    logits = masked_logits(
        q, k, bias, keep, padding, length - queries, j, scale=scale, causal=causal, window=window,
        left=left, sink=start + sink, softcap=softcap, keep_hook=keep_hook, score_hook=score_hook,
    )  # fmt: skip
    read = (slot < length) & (slot >= start)
    if selected is not None:
        runs = torch.arange(selected.shape[2]).expand(selected.shape)
        listed = runs < (selected.shape[2] if counts is None else counts[..., None])
        named = torch.where(listed, selected.long(), -1)[..., None] == slot // run
        read = read & named.any(2)[:, :, None].repeat_interleave(group, 1)
    logits = logits.masked_fill(~read, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.expand(batch, heads, queries, 1).to(logits.dtype)], 3)
    lse = logits.logsumexp(3)
    weights = (logits - lse[..., None].masked_fill(lse.isinf()[..., None], 0.0)).exp()[..., :slots]
    return weights @ v.masked_fill(v.isnan(), 0.0).repeat_interleave(group, 1), lse


def _sloped(slopes: Tensor, logits: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return logits + slopes * (j - i)
