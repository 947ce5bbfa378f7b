"""FlexAttention (Dong et al. 2024) as a way to run a spec: its mask as blocks, its soft cap as a
score modification. Compiled once per spec, for all batches and lengths (one of up to 128 tokens, a
single block of the mask, is a case of its own); without compilation it would be slower than
anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    form = _form(spec)
    out: Tensor = form.run(q, k, v, _blocks(form, q.shape[2], k.shape[2], str(q.device)))
    return out


@dataclass(frozen=True, eq=False)
class _Form:
    """A spec's function of q, k, v and the blocks of its mask, and which keys are read."""

    run: Callable[..., Tensor]
    keep: Callable[..., Tensor] | None


@lru_cache(maxsize=64)
def _form(spec: AttentionSpec) -> _Form:
    """Written out with the numbers of the spec in it: where they were variables, compiling for all
    lengths would make them arguments of the kernel. What is compiled of one function is counted
    (torch gives up after eight), so each spec has its own."""
    from torch.nn.attention.flex_attention import flex_attention

    cap = spec.softcap
    scope: dict[str, Any] = {"torch": torch, "flex_attention": flex_attention}
    score = f"lambda x, b, h, i, j: {cap!r} * torch.tanh(x / {cap!r})" if cap else "None"
    exec(
        f"keep = {_kept(spec.mask)}\n"
        f"score = {score}\n"
        "def run(q, k, v, blocks):\n"
        f"    return flex_attention(q, k, v, score_mod=score, block_mask=blocks, "
        f"scale={spec.scale!r}, enable_gqa={spec.group > 1})\n",
        scope,
    )
    return _Form(torch.compile(scope["run"], dynamic=True), scope["keep"])


def _kept(mask: Mask) -> str:
    """`Mask.keep` as the text of a function with the numbers of this mask."""
    if mask.kind == "full":
        return "None"
    text = "j <= i"
    if mask.kind == "window":
        text = f"(i - j < {mask.left}) & (j - i < {mask.left}) | (j < {mask.sink})"
        text = f"(j <= i) & ({text})" if mask.causal else text
    return f"lambda b, h, i, j: {text}"


@lru_cache(maxsize=64)
def _blocks(form: _Form, queries: int, keys: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if form.keep is None:
        return None
    return create_block_mask(form.keep, None, None, queries, keys, device)
