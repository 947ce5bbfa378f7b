"""What `flash_prefill` computes, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flash_prefill(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, keep: Tensor | None = None,
    padding: Tensor | None = None, sinks: Tensor | None = None, q_starts: Tensor | None = None,
    k_starts: Tensor | None = None, longest: int = 0, offset: int = 0, *, scale: float,
    causal: bool = True, window: bool = False, left: int = 0, sink: int = 0, softcap: float = 0.0,
    mean_of_none: bool = False, keep_hook: Any = None, score_hook: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and the log-sum-exps, in the dtype of the inputs. Hooks are plain functions here:
    `keep_hook(batch, head, i, j)` and `score_hook(logits, batch, head, i, j)`."""
    if q_starts is not None and k_starts is not None:
        parts = []
        for a, b, c, d in zip(q_starts, q_starts[1:], k_starts, k_starts[1:], strict=False):
            parts.append(flash_prefill(
                q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], offset=int(d - c - (b - a)), scale=scale,
                causal=causal, window=window, left=left, sink=sink, softcap=softcap,
                mean_of_none=mean_of_none, keep_hook=keep_hook, score_hook=score_hook,
            ))  # fmt: skip
        return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    logits = scale * q @ k.transpose(2, 3)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    i = torch.arange(offset, offset + queries)[:, None]
    j = torch.arange(keys)[None, :]
    where = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None], i, j
    if score_hook is not None:
        logits = score_hook(logits, *where)
    if bias is not None:
        logits = logits + bias
    read = (j <= i) if causal else (j >= 0)
    if window:
        read = read & ((((i - j) < left) & ((j - i) < left)) | (j < sink))
    for extra in (keep, None if padding is None else padding[:, None, None, :],
                  None if keep_hook is None else keep_hook(*where)):  # fmt: skip
        read = read if extra is None else read & extra
    logits = logits.masked_fill(~read, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.expand(batch, heads, queries, 1).to(logits.dtype)], 3)
    lse = logits.logsumexp(3)
    none = lse.isinf()[..., None]
    weights = logits.masked_fill(none, 0.0).softmax(3).masked_fill(none, 0.0)[..., :keys]
    if mean_of_none:
        weights = torch.where(none, 1.0 / max(keys, 1), weights)
    return weights @ v, lse
