"""What the backward pass of a softmax needs to know of each row beforehand."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.pieces.online_softmax import LOG2E, NEVER
from attnopt.codegen.pieces.reach import extent
from attnopt.codegen.pieces.sizes import padded_size, with_rows


@triton.jit(do_not_specialize=["queries", "tiles"])
def _row_ends(
    out, grad, lse, ends, deltas, lost, row_batch, row_head, q_starts, queries, tiles,
    HEADS: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % tiles
    h = (program // tiles % HEADS).to(tl.int64)
    b = (program // tiles // HEADS).to(tl.int64)
    base, first, queries, _, _, _ = extent(b, q_starts, q_starts, queries, queries, 0)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_V)
    there = row < queries
    token = (first + row)[:, None]
    whole = there[:, None] & (e < V)[None, :]
    out_at = out[0] + base * out[1] + h * out[2] + token * out[3] + e[None, :]
    grad_at = grad[0] + base * grad[1] + h * grad[2] + token * grad[3] + e[None, :]
    o_tile = tl.load(out_at, mask=whole, other=0.0).to(tl.float32)
    g_tile = tl.load(grad_at, mask=whole, other=0.0).to(tl.float32)
    at = base * row_batch + h * row_head + first + row
    end = tl.load(lse + at, mask=there, other=0.0)
    tl.store(ends + at, tl.where(end < NEVER, float("inf"), end * LOG2E), mask=there)
    tl.store(deltas + at, tl.sum(o_tile * g_tile, 1), mask=there)
    if lost is not None:
        total = tl.sum(tl.where((end < NEVER)[:, None], g_tile, 0.0), 0)
        tl.store(lost[0] + b * lost[1] + h * lost[2] + block * lost[3] + e, total, mask=e < V)


def row_ends(
    out: Tensor, grad: Tensor, lse: Tensor, q_starts: Tensor | None, longest: int, with_lost: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of `out` and its gradient `[batch, heads, S, V]` and contiguous log-sum-exps `[batch, heads,
    S]`: the latter in base 2, the dot products of out and grad by row, both in float32, and, where
    `with_lost`, sums of the gradients of rows without a key `[sequences, heads, tiles, V]`.

    A row whose every key is dropped, be it by a bias of the lowest number, ends at +inf, so that it
    weighs nothing. `q_starts` and `longest` as `flash_prefill` has them.
    """
    heads, width = out.shape[1], out.shape[3]
    sequences = out.shape[0] if q_starts is None else q_starts.shape[0] - 1
    ends, deltas = torch.empty_like(lse), torch.empty_like(lse)
    if q_starts is not None:  # rows beyond the last sequence
        ends.fill_(float("inf"))
        deltas.zero_()
    block = max(16, 4096 // padded_size(width))
    tiles = triton.cdiv(longest, block)
    each: Tensor | None = None
    lost: Any = None
    if with_lost:
        each = torch.empty(sequences, heads, tiles, width, dtype=torch.float32, device=out.device)
        lost = (each, *each.stride()[:3])
    _row_ends[(tiles * heads * sequences,)](
        with_rows(out), with_rows(grad), lse, ends, deltas, lost,
        *lse.stride()[:2], q_starts, out.shape[2], tiles,
        HEADS=heads, V=width, BLOCK_V=padded_size(width), BLOCK_M=block, num_warps=4, num_stages=1,
    )  # fmt: skip
    return ends, deltas, each
