"""Causal attention with one bias per key (ALiBi, Press et al. 2022, arXiv:2108.12409, as BLOOM and
MPT compute it) on torch's fused operator without a mask tensor.

softmax(scale q k^T + b) reads b as one more column of the keys: [q, 1] [k, b / scale]^T. So the
mask stays the flag that lets the operator skip what is dropped, and no `[heads, S, T]` tensor is
made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.compiler import attend
from attnopt.compiler.spec import AttentionSpec


def column(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    """The attention of a spec that `takes` is true of; shapes as in `attnopt.compiler.spec`."""
    bias = attend.extra(extras, spec, "bias")
    if bias is None or not takes(spec, q, bias):  # a later rewrite has changed the spec
        return attend.sdpa(q, k, v, extras, spec)
    per_key = (bias / spec.scale).to(k.dtype).transpose(-1, -2).expand(*k.shape[:3], 1)
    wide = spec.head_dim + 1
    q, k = torch.cat((q, torch.ones_like(q[..., :1])), -1), torch.cat((k, per_key), -1)
    v = F.pad(v, (0, wide - spec.v_dim))
    made = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=spec.scale, enable_gqa=spec.group > 1
    )
    return made[..., : spec.v_dim]


def takes(spec: AttentionSpec, q: Tensor, bias: Tensor) -> bool:
    """Whether `column` computes the spec, for queries of this dtype and a bias of this shape that
    is known to be moderate: in half precision a bias over the scale may leave the range."""
    per_head = spec.group == 1 or bias.dim() < 3 or bias.shape[-3] == 1
    one_row = bias.dim() >= 2 and bias.shape[-2] == 1
    causal = spec.mask.kind == "causal" and not spec.softcap and spec.extras == ("bias",)
    wide = q.dtype in (torch.float32, torch.float64)
    return causal and one_row and per_head and wide and spec.v_dim <= spec.head_dim + 1
