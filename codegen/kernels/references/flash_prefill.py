"""What `flash_prefill` computes, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.kernels.references.masked_logits import masked_logits


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
    keys = k.shape[2]
    logits = masked_logits(
        q, k, bias, keep, padding, offset, scale=scale, causal=causal, window=window, left=left,
        sink=sink, softcap=softcap, keep_hook=keep_hook, score_hook=score_hook,
    )  # fmt: skip
    if sinks is not None:
        logits = torch.cat([logits, sinks.expand(*logits.shape[:3], 1).to(logits.dtype)], 3)
    lse = logits.logsumexp(3)
    none = lse.isinf()[..., None]
    weights = logits.masked_fill(none, 0.0).softmax(3).masked_fill(none, 0.0)[..., :keys]
    if mean_of_none:
        weights = torch.where(none, 1.0 / max(keys, 1), weights)
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), lse
