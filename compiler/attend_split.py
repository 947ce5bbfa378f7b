"""Attention of one token to a long cache, split along the keys (FlashDecoding, Dao et al. 2023).

Torch's CPU kernel gives each batch row and head to one thread, so that a single key/value head of
a single sequence leaves all others idle. The keys are cut into parts that are attended to apart,
and merged by their log-sum-exps: with outputs o_p and log-sum-exps l_p of disjoint keys, the whole
is sum_p softmax(l)_p o_p.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHORTEST = 1024  # keys, below which parts are not worth their merge


def parts_for(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Into how many parts keys should be cut, 1 for none: one key/value head on a CPU with more
    threads than sequences, outside of torch.compile, of one dtype.

    q `[batch, 1, rows, dim]`, k `[batch, 1, T, dim]`, v `[batch, 1, T, v_dim]`.
    """
    if torch.compiler.is_compiling():  # the number of keys would be a special case of the graph
        return 1
    alike = q.dtype == k.dtype == v.dtype and q.shape[3] == v.shape[3]
    if not alike or k.shape[1] != 1 or q.device.type != "cpu" or k.shape[2] < SHORTEST:
        return 1
    return max(1, torch.get_num_threads() // q.shape[0])


def split_keys(q: Tensor, k: Tensor, v: Tensor, scale: float, parts: int) -> Tensor:
    """Attention `[batch, 1, rows, dim]` of all rows to all keys, over `parts` of at least one key
    each; what a whole division leaves over is one more part."""
    batch, _, rows, dim = q.shape
    each = k.shape[2] // parts
    whole = each * parts
    cut = [x[:, 0, :whole].unflatten(1, (parts, each)) for x in (k, v)]
    outs, sums = _attended(q.expand(batch, parts, rows, dim), cut[0], cut[1], scale)
    if whole < k.shape[2]:
        rest, last = _attended(q, k[:, :, whole:], v[:, :, whole:], scale)
        outs, sums = torch.cat((outs, rest), 1), torch.cat((sums, last), 1)
    return merged(outs, sums)


def merged(outs: Tensor, sums: Tensor) -> Tensor:
    """The attention to all keys, `[batch, 1, rows, dim]`, of outputs `[batch, parts, rows, dim]`
    and log-sum-exps `[batch, parts, rows]` of disjoint parts of them.

    Parts without a key have -inf and finite outputs; rows without any give zeros.
    """
    top = sums.amax(1, keepdim=True)
    shares = (sums - top.masked_fill(top == float("-inf"), 0.0)).exp()
    total = shares.sum(1, keepdim=True).clamp(min=1e-30)
    return ((shares / total).to(outs.dtype)[..., None] * outs).sum(1, keepdim=True)


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out, sums = flash(q, k, v, scale=scale)
    return out, sums
