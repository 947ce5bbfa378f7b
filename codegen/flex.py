"""FlexAttention (Dong et al. 2024) as a way to run a spec: its mask as blocks, its soft cap as a
score modification. Compiled once per spec; without compilation it would be slower than anything."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.spec import AttentionSpec, Mask


def runs_on_flex(spec: AttentionSpec) -> str:
    """Empty when `flex` computes this spec; otherwise the reason why not."""
    if spec.extras:
        return f"it is not used with tensors beside q, k and v: {', '.join(spec.extras)}"
    if spec.head_dim & (spec.head_dim - 1) or spec.v_dim & (spec.v_dim - 1):
        return "its kernel wants head dimensions that are powers of two"
    return ""


def flex(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec) -> Tensor:
    """The spec by FlexAttention; see `runs_on_flex`."""
    blocks = _blocks(spec.mask, q.shape[2], k.shape[2], str(q.device))
    out: Tensor = _compiled()(
        q, k, v, score_mod=_capped(spec.softcap), block_mask=blocks, scale=spec.scale,
        enable_gqa=spec.group > 1,
    )  # fmt: skip
    return out


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=64)
def _blocks(mask: Mask, queries: int, keys: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if mask.kind == "full":
        return None
    return create_block_mask(lambda b, h, i, j: mask.keep(i, j), None, None, queries, keys, device)


@lru_cache(maxsize=64)
def _capped(cap: float) -> Any:
    if not cap:
        return None
    return lambda score, b, h, i, j: cap * torch.tanh(score / cap)
