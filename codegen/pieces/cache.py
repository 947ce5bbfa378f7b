"""Where the keys and values of a sequence lie in its cache.

A sequence's readable tokens are counted x = 0, 1, 2, ... whatever the cache: a program reads a run
of them. From x follows the slot, from the slot the token's position and the row in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slot_of(x, there, origin, sink, shift, selected, RUN: tl.constexpr, GAP: tl.constexpr):
    """The slot of readable token `x`, where `there`.

    Tokens start at slot `origin`. GAP: `shift` tokens between the first `sink` and the window are
    not read. `selected`: pointer and stride of the list of runs of RUN slots that are read.
    """
    if selected is not None:
        run = tl.load(selected[0] + x // RUN * selected[1], mask=there, other=0)
        return run * RUN + x % RUN
    elif GAP:
        return origin + x + tl.where(x >= sink, shift, 0)
    else:
        return origin + x


@triton.jit
def position_in_ring(slot, length, sink, slots):
    """The position of the newest token in `slot` of a ring of `slots`, its first `sink` fixed."""
    newest = length - 1
    return tl.where(slot < sink, slot, newest - (newest - slot) % tl.maximum(slots - sink, 1))


@triton.jit
def row_of(slot, there, table, PAGE: tl.constexpr):
    """The page of a slot and the row in it, both int64. Without a table, of pointer and stride,
    there is one page."""
    if table is not None:
        page = tl.load(table[0] + slot // PAGE * table[1], mask=there, other=0)
        return page.to(tl.int64), (slot % PAGE).to(tl.int64)
    else:
        return tl.zeros_like(slot).to(tl.int64), slot.to(tl.int64)
