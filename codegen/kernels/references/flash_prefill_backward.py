"""What `flash_prefill_backward` computes, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.kernels.references.masked_logits import masked_logits


def flash_prefill_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor, lse: Tensor,
    bias: Tensor | None = None, sinks: Tensor | None = None, mean_of_none: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of q, k, v, and of bias and sinks where given, in the dtype of the inputs;
    `out` and `lse` are taken as they are. Logits are differentiated by torch."""
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    q, k = (x.detach().requires_grad_() for x in (q, k))
    given = None if bias is None else bias.detach().requires_grad_()
    with torch.enable_grad():
        logits = masked_logits(q, k, bias=given, **options)
    none = (lse == float("-inf"))[..., None]
    weights = (logits - lse.masked_fill(none[..., 0], 0.0)[..., None]).exp().masked_fill(none, 0.0)
    delta = (grad * out).sum(3, keepdim=True)
    group = heads // k.shape[1]
    slopes = weights * (grad @ v.repeat_interleave(group, 1).mT - delta)
    wanted = [q, k] if given is None else [q, k, given]
    dq, dk, *rest = torch.autograd.grad(logits, wanted, slopes.detach())
    if mean_of_none:
        weights = torch.where(none, 1.0 / max(keys, 1), weights)
    dv = (weights.detach().mT @ grad).unflatten(1, (-1, group)).sum(2)
    if sinks is not None:
        share = (sinks.to(lse.dtype) - lse[..., None]).exp().masked_fill(none, 0.0)
        rest.append(-(share * delta).expand(batch, heads, queries, 1).sum_to_size(sinks.shape))
    return dq, dk, dv, *rest
