"""Loading a tile with as little masking as its place and shape allow."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(pointers, rows, columns, SOME_ROWS: tl.constexpr, SOME_COLUMNS: tl.constexpr):
    """A tile of any orientation, zero where not there. `rows` and `columns` are masks that
    broadcast to it; each is looked at only where its flag says that it can be false."""
    if SOME_ROWS and SOME_COLUMNS:
        return tl.load(pointers, mask=rows & columns, other=0.0)
    elif SOME_ROWS:
        return tl.load(pointers, mask=rows & (columns | True), other=0.0)
    elif SOME_COLUMNS:
        return tl.load(pointers, mask=columns & (rows | True), other=0.0)
    else:
        return tl.load(pointers)
