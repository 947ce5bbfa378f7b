"""Which tiles are read at all, and which of them whole, so that nothing need be masked there.

Both ways round: the tiles of keys that a tile of queries reads, and the tiles of queries that read
a tile of keys. Of the tiles [first, last) every pair of [inner, whole) is read.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def extent(b, q_starts, k_starts, queries, keys, offset):
    """Of sequence `b`: its row in the batch, its first query and their number, its first key and
    their number, and the position of the first query. With `q_starts` and `k_starts` the sequences
    lie one after the other in a batch of one, and the last queries stand at the last keys."""
    if q_starts is not None:
        first_query = tl.load(q_starts + b)
        count = tl.load(q_starts + b + 1) - first_query
        first_key = tl.load(k_starts + b)
        there = tl.load(k_starts + b + 1) - first_key
        return b * 0, first_query.to(tl.int64), count, first_key.to(tl.int64), there, there - count
    else:
        return b, b * 0, queries, b * 0, keys, offset


@triton.jit
def key_tiles(
    lowest, highest, keys, left, sink,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tiles of keys for queries at the positions `lowest` to `highest`: how many from the start
    hold sink tokens before the window, then first, inner, whole and last."""
    end = keys  # behind the last key that some row reads
    full = keys  # and behind the last of those that all rows read
    if CAUSAL:
        end = tl.minimum(keys, highest + 1)
        full = tl.minimum(keys, lowest + 1)
    elif WINDOW:
        end = tl.minimum(keys, tl.maximum(highest + left, sink))
        full = tl.minimum(keys, lowest + left)
    last = tl.cdiv(tl.maximum(end, 0), BLOCK_N)
    first = last * 0
    inner = first
    sinking = first
    if WINDOW:
        first = tl.minimum(tl.maximum(lowest - left + 1, 0) // BLOCK_N, last)
        inner = tl.minimum(tl.cdiv(tl.maximum(highest - left + 1, 0), BLOCK_N), last)
        if SINK:
            sinking = tl.minimum(tl.cdiv(sink, BLOCK_N), first)
    whole = tl.maximum(tl.maximum(full, 0) // BLOCK_N, inner)
    return sinking, first, inner, whole, last


@triton.jit
def query_tiles(
    lowest, highest, queries, offset, left, sink,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The tiles of queries, the first at position `offset`, that read the keys `lowest` to
    `highest`: first, inner, whole and last. A tile that is not full of queries is not whole."""
    begin, end = queries * 0, queries  # of the queries that read some of the keys
    from_all, to_all = begin, end  # of those that read all of them
    if CAUSAL:
        begin, from_all = lowest - offset, highest - offset
    if WINDOW:
        end, to_all = highest + left - offset, lowest + left - offset
        if not CAUSAL:
            begin, from_all = lowest - left + 1 - offset, highest - left + 1 - offset
        if SINK:
            if not CAUSAL:
                begin = tl.where(lowest < sink, 0, begin)
                from_all = tl.where(highest < sink, 0, from_all)
            end = tl.where(lowest < sink, queries, end)
            to_all = tl.where(highest < sink, queries, to_all)
    last = tl.cdiv(tl.maximum(tl.minimum(end, queries), 0), BLOCK_M)
    first = tl.minimum(tl.maximum(begin, 0) // BLOCK_M, last)
    inner = tl.minimum(tl.cdiv(tl.maximum(from_all, 0), BLOCK_M), last)
    whole = tl.maximum(tl.maximum(tl.minimum(to_all, queries), 0) // BLOCK_M, inner)
    return first, inner, whole, last
