"""What every softmax over tiles of keys does with one of them."""

from __future__ import annotations

import triton
import triton.language as tl

from attnopt.codegen.pieces.masks import scored, within
from attnopt.codegen.pieces.online_softmax import absorb
from attnopt.codegen.pieces.tiles import load_tile


@triton.jit
def attend(
    state, q, start, source, rows, edits, reach,
    MASK: tl.constexpr, EDITS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The state with the keys [start, start + BLOCK_N) absorbed.

    Bundles, because several kernels pass all of it on:
    `state` the running (top, total, out) of `online_softmax`; `q` [M, BLOCK_D]; `source` (k, v,
    their token strides, number of keys), pointers to the head's first key and value; `rows` (batch,
    head, position, index, number of queries), see `scored`; `edits` (bias, keep, padding, scale,
    cap, data) and `reach` (left, sink). MASK (CAUSAL, WINDOW, SINK), EDITS (CAPPED, SCORE_HOOK,
    KEEP_HOOK), TILE (D, V, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION). MASKED where a row of the tile
    may not read all these keys, or not all are there; nothing is compared otherwise.
    """
    D: tl.constexpr = TILE[0]
    V: tl.constexpr = TILE[1]
    BLOCK_D: tl.constexpr = TILE[2]
    BLOCK_V: tl.constexpr = TILE[3]
    BLOCK_N: tl.constexpr = TILE[4]
    PRECISION: tl.constexpr = TILE[5]
    k, v, k_stride, v_stride, keys = source
    b, h, i, row, queries = rows
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    j = start + n
    k_tile = load_tile(
        k + tl.cast(start, tl.int64) * k_stride + (n[None, :] * k_stride + d[:, None]),
        (j < keys)[None, :], (d < D)[:, None], MASKED, D != BLOCK_D,
    )  # fmt: skip
    raw = tl.dot(q, k_tile, input_precision=PRECISION)
    logits, factor = scored(
        raw, b, h, i, j[None, :], row, queries, edits[0], edits[1], edits[2], keys, edits[3],
        edits[4], edits[5], EDITS[0], EDITS[1], EDITS[2],
    )  # fmt: skip
    if MASKED:
        read = within(i, j[None, :], keys, reach[0], reach[1], MASK[0], MASK[1], MASK[2])
        logits = tl.where(read, logits, float("-inf"))
    v_tile = load_tile(
        v + tl.cast(start, tl.int64) * v_stride + (n[:, None] * v_stride + e[None, :]),
        (j < keys)[:, None], (e < V)[None, :], MASKED, V != BLOCK_V,
    )  # fmt: skip
    top, total, out = state
    return absorb(top, total, out, logits, factor, v_tile, PRECISION)


@triton.jit
def mean_values(
    v, keys, v_stride, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The mean of all values [1, BLOCK_V]: what a row gets whose every logit is the same."""
    n = tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, keys, BLOCK_N):
        at = v + tl.cast(start, tl.int64) * v_stride + n[:, None] * v_stride + e[None, :]
        there = (start + n < keys)[:, None] & (e < V)[None, :]
        total += tl.sum(tl.load(at, mask=there, other=0.0).to(tl.float32), 0)
    return (total / tl.maximum(keys, 1))[None, :]
