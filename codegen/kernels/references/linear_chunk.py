"""What `linear_chunk` computes, in plain torch: all pairs of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def features(x: Tensor, feature: str = "identity", two_sided: bool = False) -> Tensor:
    """phi(x) along the last dimension."""
    if two_sided:
        return torch.cat([features(x, feature), features(-x, feature)], -1)
    known = {"identity": lambda: x, "elu": lambda: F.elu(x) + 1, "relu": x.relu}
    return known.get(feature, lambda: x.softmax(-1))()


def linear_chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None, initial: Tensor | None = None,
    initial_sums: Tensor | None = None, *, feature: str = "identity", two_sided: bool = False,
    scale: float = 1.0, normalised: bool = False, eps: float = 1e-6, causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, the final states and the final sums, per query head, in the dtype of the
    inputs."""
    batch, heads, tokens = q.shape[:3]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    q, k = (features(x, feature, two_sided) for x in (q, k))
    v = torch.cat([v, torch.ones_like(v[..., :1])], 3)  # sums are one more channel of states
    state = q.new_zeros(batch, heads, q.shape[3], v.shape[3])
    for at, given in ((slice(0, -1), initial), (slice(-1, None), initial_sums)):
        if given is not None:
            given = given if given.dim() == 4 else given[..., None]
            state[..., at] = given.repeat_interleave(heads // given.shape[1], 1).to(q.dtype)
    logs = q.new_zeros(batch, heads, tokens)
    if decay is not None:
        decay = decay[:, None] if decay.dim() == 1 else decay
        logs = logs + decay.repeat_interleave(heads // decay.shape[-2], -2).to(q.dtype)
    logs = logs.cumsum(2)
    gaps = logs[..., :, None] - logs[..., None, :]
    if causal:
        gaps = gaps.masked_fill(torch.ones_like(gaps, dtype=torch.bool).triu(1), float("-inf"))
    out = (q @ k.mT * gaps.exp()) @ v + logs[..., None].exp() * (q @ state)
    until = (logs[..., -1:] - logs).exp()[..., None]
    state = logs[..., -1].exp()[..., None, None] * state + (k * until).mT @ v
    out = scale * out
    top = out[..., :-1] / (out[..., -1:] + eps) if normalised else out[..., :-1]
    return top, state[..., :-1], state[..., -1]
