"""What `merge_partials` computes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_partials(
    parts: Tensor | tuple[Tensor, ...], lse: Tensor | tuple[Tensor, ...], out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exps, in the dtype of the log-sum-exps."""
    if isinstance(parts, tuple):
        parts = torch.cat([part.to(lse[0].dtype) for part in parts])
        lse = torch.cat(list(lse))
    assert isinstance(lse, Tensor)
    empty = lse.isneginf()[..., None]
    merged = lse.logsumexp(0)
    weights = (lse - merged.masked_fill(merged.isneginf(), 0.0)).exp()[..., None]
    return (weights * parts.masked_fill(empty, 0.0)).sum(0), merged
