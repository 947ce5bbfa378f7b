"""What `latent_decode` computes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def latent_decode(
    q_latent: Tensor, q_rope: Tensor, latents: Tensor, k_rope: Tensor,
    lengths: Tensor | None = None, starts: Tensor | None = None, table: Tensor | None = None,
    padding: Tensor | None = None, *, scale: float, causal: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and the log-sum-exps, in the dtype of the inputs."""
    batch, _, queries = q_latent.shape[:3]
    if table is not None:
        latents, k_rope = (x[table.long()].flatten(1, 2) for x in (latents, k_rope))
    slots = latents.shape[1]
    slot = torch.arange(slots)
    length = torch.full([batch], slots) if lengths is None else lengths.long()
    length = length[:, None, None, None]
    logits = q_latent @ latents[:, None].transpose(2, 3) + q_rope @ k_rope[:, None].transpose(2, 3)
    read = slot < length
    if starts is not None:
        read = read & (slot >= starts.long()[:, None, None, None])
    if padding is not None:
        read = read & padding[:, None, None, :]
    if causal:
        read = read & (slot <= length - queries + torch.arange(queries)[:, None])
    logits = (scale * logits).masked_fill(~read, float("-inf"))
    lse = logits.logsumexp(3)
    weights = (logits - lse[..., None].masked_fill(lse.isinf()[..., None], 0.0)).exp()
    return weights @ latents.masked_fill(latents.isnan(), 0.0)[:, None], lse
