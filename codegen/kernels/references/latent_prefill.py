"""What `latent_prefill` computes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def latent_prefill(
    q: Tensor, k_nope: Tensor, k_rope: Tensor, v: Tensor, padding: Tensor | None = None,
    offset: int = 0, *, scale: float, causal: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and the log-sum-exps, in the dtype of the inputs."""
    k = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:3], k_rope.shape[3])], 3)
    logits = scale * q @ k.transpose(2, 3)
    keys = torch.arange(k.shape[2])
    read = (keys >= 0)[None, None, None]
    if causal:
        read = read & (keys <= offset + torch.arange(q.shape[2])[:, None])
    if padding is not None:
        read = read & padding[:, None, None, :]
    logits = logits.masked_fill(~read, float("-inf"))
    lse = logits.logsumexp(3)
    weights = (logits - lse[..., None].masked_fill(lse.isinf()[..., None], 0.0)).exp()
    return weights @ v, lse
