"""One tile of the backward pass of a softmax over keys (FlashAttention-2, Dao 2023, algorithm 2).

The weights are computed again from the logits and each row's log-sum-exp in base 2, `ends`, which
is +inf for a row that reads nothing: such a row, and one that is not there, weighs all keys zero.
Tiles are of queries by keys or of keys by queries; what belongs to a row or column broadcasts.
Bundles are those of `attend`, and EDITS has one hook more: (CAPPED, SCORE_HOOK, KEEP_HOOK,
SLOPE_HOOK).
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnopt.codegen.pieces.masks import scored, within
from attnopt.codegen.pieces.online_softmax import soft_cap
from attnopt.codegen.pieces.tiles import load_tile


@triton.jit
def _weights(
    raw, ends, rows, j, keys, edits, reach,
    MASK: tl.constexpr, EDITS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    b, h, i, row, queries = rows
    logits, factor = scored(
        raw, b, h, i, j, row, queries, edits[0], edits[1], edits[2], keys, edits[3], edits[4],
        edits[5], EDITS[0], EDITS[1], EDITS[2],
    )  # fmt: skip
    if MASKED:
        read = within(i, j, keys, reach[0], reach[1], MASK[0], MASK[1], MASK[2])
        logits = tl.where(read, logits, float("-inf"))
    return tl.exp2(logits * factor - ends)


@triton.jit
def _chained(slopes, raw, rows, j, edits, EDITS: tl.constexpr):
    """The gradient of the scaled product, from that of the logits."""
    b, h, i, _, _ = rows
    if EDITS[0] or EDITS[3] is not None:
        logits = raw * edits[3]
        if EDITS[0]:
            logits = soft_cap(logits, edits[4])
        if EDITS[3] is not None:
            slopes *= EDITS[3](logits, b, h, i, j, edits[5])
        if EDITS[0]:  # of cap * tanh(x / cap): 1 - tanh(x / cap)^2
            share = logits / edits[4]
            slopes *= 1.0 - share * share
    return slopes


@triton.jit
def absorb_queries(
    state, k_tile, v_tile, start, source, rows, j, keys, edits, reach,
    MASK: tl.constexpr, EDITS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradients (dk over the scale, dv) of keys with the queries [start, start + BLOCK_M) of
    one head added.

    `k_tile` [N, BLOCK_D], `v_tile` [N, BLOCK_V], `j` [N, 1]; `source` (q, grad, ends, deltas, token
    strides of q and grad), pointers to the head's first query; `rows` (batch, head, offset, number
    of queries). TILE (D, V, BLOCK_D, BLOCK_V, BLOCK_M, PRECISION). Rows of keys that are not there
    get numbers that mean nothing.
    """
    D: tl.constexpr = TILE[0]
    V: tl.constexpr = TILE[1]
    PRECISION: tl.constexpr = TILE[5]
    q, grad, ends, deltas, q_stride, grad_stride = source
    b, h, offset, queries = rows
    m = tl.arange(0, TILE[4])
    d = tl.arange(0, TILE[2])
    e = tl.arange(0, TILE[3])
    row = start + m
    there = row < queries
    first = tl.cast(start, tl.int64)
    q_tile = load_tile(
        q + first * q_stride + (m[:, None] * q_stride + d[None, :]),
        there[:, None], (d < D)[None, :], MASKED, TILE[2] != D,
    )  # fmt: skip
    raw = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
    if MASKED:
        end = tl.load(ends + row, mask=there, other=float("inf"))
        delta = tl.load(deltas + row, mask=there, other=0.0)
    else:
        end = tl.load(ends + row)
        delta = tl.load(deltas + row)
    facts = (b, h, (offset + row)[None, :], row[None, :], queries)
    weights = _weights(raw, end[None, :], facts, j, keys, edits, reach, MASK, EDITS, MASKED)
    g_tile = load_tile(
        grad + first * grad_stride + (m[:, None] * grad_stride + e[None, :]),
        there[:, None], (e < V)[None, :], MASKED, TILE[3] != V,
    )  # fmt: skip
    dk, dv = state
    dv = tl.dot(weights.to(g_tile.dtype), g_tile, dv, input_precision=PRECISION)
    slopes = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)
    slopes = _chained(weights * (slopes - delta[None, :]), raw, facts, j, edits, EDITS)
    dk = tl.dot(slopes.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def absorb_keys(
    dq, q_tile, g_tile, ends, deltas, start, source, rows, edits, reach, dbias,
    MASK: tl.constexpr, EDITS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradient `dq` (over the scale) of queries with the keys [start, start + BLOCK_N) added.

    `q_tile` [M, BLOCK_D], `g_tile` [M, BLOCK_V], `ends` and `deltas` [M, 1]; `source`, `rows` and
    TILE as `attend` has them. The gradient of the logits goes to `dbias` (pointer to the head's
    first row, query and key stride) where given.
    """
    D: tl.constexpr = TILE[0]
    V: tl.constexpr = TILE[1]
    PRECISION: tl.constexpr = TILE[5]
    k, v, k_stride, v_stride, keys = source
    n = tl.arange(0, TILE[4])
    d = tl.arange(0, TILE[2])
    e = tl.arange(0, TILE[3])
    j = start + n
    there = (j < keys)[:, None]
    first = tl.cast(start, tl.int64)
    k_tile = load_tile(
        k + first * k_stride + (n[:, None] * k_stride + d[None, :]),
        there, (d < D)[None, :], MASKED, TILE[2] != D,
    )  # fmt: skip
    raw = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    weights = _weights(raw, ends, rows, j[None, :], keys, edits, reach, MASK, EDITS, MASKED)
    v_tile = load_tile(
        v + first * v_stride + (n[:, None] * v_stride + e[None, :]),
        there, (e < V)[None, :], MASKED, TILE[3] != V,
    )  # fmt: skip
    slopes = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
    slopes = weights * (slopes - deltas)
    if dbias is not None:
        at = dbias[0] + rows[3].to(tl.int64) * dbias[1] + j[None, :].to(tl.int64) * dbias[2]
        stored = slopes.to(dbias[0].dtype.element_ty)
        tl.store(at, stored, mask=(rows[3] < rows[4]) & (j < keys)[None, :])
    slopes = _chained(slopes, raw, rows, j[None, :], edits, EDITS)
    return tl.dot(slopes.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
