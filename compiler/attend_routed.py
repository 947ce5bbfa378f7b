"""Attention of one token to a cache of which it reads some key/value heads only.

Heads that are off cost nothing: the keys and values of the others are read where they lie, as views
of neighbouring heads, and nothing is copied. Each such view is a call of a kernel of its own, which
takes a fixed time, so that this pays for a long cache alone. Torch's CPU kernel gives a head to one
thread; heads that would leave threads idle are called one by one, their keys shared among threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnopt.compiler.attend_step import to_all
from attnopt.compiler.spec import AttentionSpec

# Numbers of the cache that a call must leave unread to be worth it, for each thread that would
# have read them. Measured on one core, with one thread: below it one call for all heads was faster.
LEAST = 1 << 19

Calls = list[tuple[int, int]]


def calls(
    on: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, least: int = LEAST
) -> Calls | None:
    """The key/value heads of each call, first and behind the last; None where one call for all of
    them is faster, for several sequences or tokens, and under torch.compile.

    on bool `[batch, heads, S, 1]`, k `[batch, kv_heads, T, dim]`, v `[batch, kv_heads, T, v_dim]`.
    """
    if torch.compiler.is_compiling() or k.device.type != "cpu":
        return None
    each = k.shape[2] * (k.shape[3] + v.shape[3])
    threads = torch.get_num_threads()
    if len(k) != 1 or on.shape[2] != 1 or each * spec.kv_heads <= least * threads:
        return None
    wanted = on.view(spec.kv_heads, spec.group).any(1).tolist()
    shares = 1 if spec.extras or spec.softcap else threads
    found = _cut(wanted, shares)
    unread = (spec.kv_heads - sum(wanted)) * each
    return found if unread >= least * threads * len(found) else None


def to_active(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec, at: Calls
) -> Tensor:
    """`attend_step.to_all` for one token and the key/value heads of some calls; zeros elsewhere."""
    out = q.new_zeros(len(q), spec.heads, 1, v.shape[-1])
    for first, last in at:
        part = _part(spec, last - first)
        heads = slice(first * spec.group, last * spec.group)
        given = [
            x if name == "padding" or x.dim() < 3 or x.shape[-3] == 1 else x[..., heads, :, :]
            for name, x in zip(spec.extras, extras, strict=True)
        ]
        out[:, heads] = to_all(q[:, heads], k[:, first:last], v[:, first:last], given, part)
    return out


@lru_cache(maxsize=256)
def _part(spec: AttentionSpec, kv_heads: int) -> AttentionSpec:
    return spec.with_(heads=kv_heads * spec.group, kv_heads=kv_heads)


def _cut(wanted: Sequence[bool], shares: int) -> Calls:
    """Neighbours that are wanted: a multiple of `shares` of them at once, the others one by one."""
    found: Calls = []
    first = 0
    while first < len(wanted):
        if not wanted[first]:
            first += 1
            continue
        end = next((at for at in range(first, len(wanted)) if not wanted[at]), len(wanted))
        whole = first + (end - first) // shares * shares
        found += [(first, whole)] if whole > first else []
        found += [(at, at + 1) for at in range(whole, end)]
        first = end
    return found
