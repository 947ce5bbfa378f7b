"""What `linear_step` computes, in plain torch: token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.codegen.kernels.references.linear_chunk import features


def linear_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, sums: Tensor | None = None,
    decay: Tensor | None = None, *, feature: str = "identity", two_sided: bool = False,
    scale: float = 1.0, normalised: bool = False, eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, and the states and sums after the last token, in the dtype of the inputs."""
    heads, states = q.shape[1], state.shape[1]
    k, v = (x.repeat_interleave(states // x.shape[1], 1) for x in (k, v))
    q, k = (features(x, feature, two_sided) for x in (q, k))
    state = state.to(q.dtype)
    sums = torch.zeros_like(state[..., 0]) if sums is None else sums.to(q.dtype)
    rows = []
    for t in range(q.shape[2]):
        if decay is not None:
            left = (decay if decay.dim() == 1 else decay[..., t]).to(q.dtype).exp()[..., None]
            state, sums = left[..., None] * state, left * sums
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        sums = sums + k[:, :, t]
        at = q[:, :, t, None, :]
        row = scale * (at @ state.repeat_interleave(heads // states, 1))
        if normalised:
            bottom = at @ sums.repeat_interleave(heads // states, 1)[..., None]
            row = row / (scale * bottom + eps)
        rows.append(row)
    return torch.cat(rows, 2), state, sums
