"""The logits of an attention, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masked_logits(
    q: Tensor, k: Tensor, bias: Tensor | None = None, keep: Tensor | None = None,
    padding: Tensor | None = None, offset: Any = 0, j: Tensor | None = None, *, scale: float,
    causal: bool = True, window: bool = False, left: int = 0, sink: Any = 0, softcap: float = 0.0,
    keep_hook: Any = None, score_hook: Any = None,
) -> Tensor:  # fmt: skip
    """The logits `[batch, heads, S, T]`, -inf where a key is not read. Queries stand at `offset`
    and after, keys at `j` (0 and after); these and `sink` may differ between sequences."""
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    logits = scale * q @ k.repeat_interleave(heads // k.shape[1], 1).transpose(2, 3)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    i = offset + torch.arange(queries)[:, None]
    j = torch.arange(keys)[None, :] if j is None else j
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
    return logits.masked_fill(~read, float("-inf"))
