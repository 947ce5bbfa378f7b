"""Attention of new tokens to a cache of latents, absorbed: in plain torch, or on a GPU, for the
backend "triton", by what is dispatched there.

`kept` `[batch, 1, T, width]` holds the vectors of all tokens, the new ones last; `up_k` `[groups,
head_dim, width]` and `up_v` `[groups, v_dim, rank]` make keys and values of them, `bias` `[groups,
v_dim]` is added to the values. A model that was trained so has keys of two parts, one made of the
`rank` first numbers for each head, and one that is the others as they are, for all heads; `rope_at`
is its first channel, -1 where keys are made otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnopt.compiler import attend_step
from attnopt.compiler.spec import AttentionSpec


def step(
    q: Tensor, kept: Tensor, up_k: Tensor, up_v: Tensor, bias: Tensor, extras: Sequence[Tensor],
    spec: AttentionSpec, line: str, rope_at: int,
) -> Tensor:  # fmt: skip
    """Attention of new tokens, q `[batch, heads, S, head_dim]`, to all that are kept."""
    if not attend_step.on_gpu(spec, q):
        return absorbed(q, kept, up_k, up_v, bias, extras, spec, attend_step.newest)
    if attend_step.traced(q):
        made: Tensor = torch.ops.attnopt.latent_step(
            q, kept, up_k, up_v, bias, extras, line, rope_at
        )
        return made
    run = attend_step.dispatching("latent_step")
    return run(q, kept, up_k, up_v, bias, extras, spec, rope_at)


def prompt(
    q: Tensor, k: Tensor, v: Tensor, joined: Tensor, extras: Sequence[Tensor], spec: AttentionSpec,
    line: str, rank: int, rope_at: int,
) -> Tensor:  # fmt: skip
    """Attention among the tokens of a prompt, of which `joined` `[batch, 1, S, width]` is kept."""
    if rope_at < 0 or attend_step.traced(q) or not attend_step.on_gpu(spec, q):
        return attend_step.among(q, k, v, extras, spec, line)
    run = attend_step.dispatching("latent_prompt")
    return run(q, k, v, joined[..., rank:], extras, spec, rope_at)


def absorbed(
    q: Tensor, kept: Tensor, up_k: Tensor, up_v: Tensor, bias: Tensor, extras: Sequence[Tensor],
    spec: AttentionSpec, attention: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """All query heads attend to what is kept, as if it were the one key/value head, by
    `attention(q, k, v, extras, spec)`; values are made of the result."""
    batch, heads, new, dim = q.shape
    groups, width, rank = up_k.shape[0], up_k.shape[2], up_v.shape[2]
    each = heads // groups * new
    rows = (q.reshape(batch, groups, each, dim) @ up_k).reshape(batch, heads, new, width)
    mixed = attention(rows, kept, kept[..., :rank], extras, one_head(spec, width, rank))
    values = mixed.reshape(batch, groups, each, rank) @ up_v.transpose(1, 2)
    return (values + bias[:, None]).reshape(batch, heads, new, up_v.shape[1])


def one_head(spec: AttentionSpec, width: int, rank: int) -> AttentionSpec:
    """The spec of the attention to what is kept."""
    return spec.with_(kv_heads=1, head_dim=width, v_dim=rank)


def rope_at(up_k: Tensor, rank: int) -> int:
    """The first channel of keys that are what is kept behind the first `rank` numbers, as it is and
    for all heads, and no other channel has a part of it; -1 where keys are made otherwise."""
    if up_k.is_meta:
        return -1
    of_latent, of_shared = up_k[..., :rank], up_k[..., rank:]
    size = of_shared.shape[2]
    used = of_shared.ne(0).any(2).any(0).nonzero()
    first = int(used[0]) if size and len(used) else -1
    if first < 0 or len(used) != size or first + size > up_k.shape[1]:
        return -1
    same = torch.eye(size, dtype=up_k.dtype, device=up_k.device)
    alone = not bool(of_latent[:, first : first + size].any())
    return first if alone and bool((of_shared[:, first : first + size] == same).all()) else -1
