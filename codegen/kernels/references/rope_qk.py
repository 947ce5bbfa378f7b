"""What `rope_qk` computes, in plain torch; the caches that are given stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_qk(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    k_cache: Tensor | None = None, v_cache: Tensor | None = None, slots: Tensor | None = None,
    pages: Tensor | None = None, q_weight: Tensor | None = None, k_weight: Tensor | None = None,
    *, sink: int = 0, interleaved: bool = False, first: int = 0, eps: float = 1e-6,
    unit_offset: bool = False, keep_keys: bool = False, ring: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What the launcher returns, in the dtype of the inputs."""
    positions = positions.expand(q.shape[0], q.shape[2]).long()
    cos, sin = cos[positions][:, None].to(q.dtype), sin[positions][:, None].to(q.dtype)
    half = cos.shape[-1]

    def rotated(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.clone()
        if weight is not None:
            x = x / (x.square().mean(3, keepdim=True) + eps).sqrt()
            x = x * (weight.to(x.dtype) + float(unit_offset))
        part = x[..., first : first + 2 * half].clone()
        a = part[..., 0::2] if interleaved else part[..., :half]
        b = part[..., 1::2] if interleaved else part[..., half:]
        turned = a * cos - b * sin, b * cos + a * sin
        part = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        x[..., first : first + 2 * half] = part
        return x

    q, k = rotated(q, q_weight), rotated(k, k_weight)
    if k_cache is None or v_cache is None:
        return q, k
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    places = (positions if slots is None else slots.expand_as(positions)).tolist()
    size = k_cache.shape[2]
    for b, row in enumerate(places):
        for place, s in sorted(zip(row, range(len(row)), strict=True)):
            if place < 0:  # the others in order: where a ring comes round, the largest stays
                continue
            where = b
            if pages is not None:
                where, place = int(pages[b, place // size]), place % size
            elif ring and place >= sink:
                place = sink + (place - sink) % (size - sink)
            k_cache[where, :, place] = k[b, :, s].to(k_cache.dtype)
            v_cache[where, :, place] = v[b, :, s].to(v_cache.dtype)
    return (q, k, k_cache, v_cache) if keep_keys else (q, k_cache, v_cache)
