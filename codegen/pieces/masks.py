"""Which keys a query reads, and what is done to a tile of logits before the softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from attnopt.codegen.pieces.online_softmax import LOG2E, soft_cap


@triton.jit
def within(i, j, keys, left, sink, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr):
    """Whether query `i` reads key `j`, of `keys`: tiles of positions that broadcast.

    WINDOW keeps i - j < left (and j - i < left where not CAUSAL), or j < sink where SINK. What can
    be told of a row is told of the row, which leaves few comparisons for each key.
    """
    kept = j <= tl.minimum(i, keys - 1) if CAUSAL else j < keys
    if WINDOW:
        near = j > i - left
        if not CAUSAL:
            near = near & (j < i + left)
        if SINK:
            near = near | (j < sink)
        kept = kept & near
    return kept


LOWEST: tl.constexpr = tl.constexpr(-5.0e29)  # above the floor of the running maximum in base 2


@triton.jit
def scored(
    raw, b, h, i, j, row, rows, bias, keep, padding, keys, scale, cap, data,
    CAPPED: tl.constexpr, SCORE_HOOK: tl.constexpr, KEEP_HOOK: tl.constexpr,
):  # fmt: skip
    """A tile of q k^T as logits in base 2 over a factor, and that factor.

    `b` is a scalar; `h`, the position `i` and the query's index `row` are [M, 1] (`row` < `rows`
    where there is one), `j` [1, N]. `bias` and `keep` are (pointer, batch, head,
    query and key stride), `padding` (pointer, batch and key stride), each None where there is none.
    Where nothing is added, the factor holds the scale, so that the softmax multiplies and subtracts
    in one instruction.
    """
    plain: tl.constexpr = (not CAPPED) and SCORE_HOOK is None and bias is None
    factor = scale * LOG2E if plain else 1.0
    logits = raw
    if not plain:
        logits = raw * scale
        if CAPPED:
            logits = soft_cap(logits, cap)
        if SCORE_HOOK is not None:
            logits = SCORE_HOOK(logits, b, h, i, j, data)
        logits = logits * LOG2E
        if bias is not None:
            at = bias[0] + b * bias[1] + h * bias[2] + row.to(tl.int64) * bias[3]
            at += j.to(tl.int64) * bias[4]
            added = tl.load(at, mask=(row < rows) & (j < keys), other=0.0).to(tl.float32)
            # A row of the lowest number alone weighs its keys alike, as long as that stays finite.
            # It is the lowest only now: multiplied by log2(e) afterwards, it would be rounded in
            # one place, and not where a compiler fuses the product with taking off the maximum.
            logits += tl.where(added == float("-inf"), added, tl.maximum(added * LOG2E, LOWEST))
    if keep is not None:
        at = keep[0] + b * keep[1] + h * keep[2] + row.to(tl.int64) * keep[3]
        at += j.to(tl.int64) * keep[4]
        logits = tl.where(
            tl.load(at, mask=(row < rows) & (j < keys), other=0) != 0, logits, float("-inf")
        )
    if padding is not None:
        real = tl.load(padding[0] + b * padding[1] + j * padding[2], mask=j < keys, other=0)
        logits = tl.where(real != 0, logits, float("-inf"))
    if KEEP_HOOK is not None:
        logits = tl.where(KEEP_HOOK(b, h, i, j, data), logits, float("-inf"))
    return logits, factor
