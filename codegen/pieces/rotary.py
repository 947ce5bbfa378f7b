"""The channels that a rotary embedding turns together, in either of their two orders: channel c
with c + HALF, or neighbours (INTERLEAVED)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_pairs(x, at, there, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two channels of each pair, [T, H, BLOCK] each in float32, from x + at [T, H, 1] on."""
    if INTERLEAVED:
        c = tl.arange(0, 2 * BLOCK)[None, None, :]
        both = tl.load(x + at + c, mask=there & (c < 2 * HALF), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [both.shape[0], both.shape[1], BLOCK, 2]))
    else:
        c = tl.arange(0, BLOCK)[None, None, :]
        a = tl.load(x + at + c, mask=there & (c < HALF), other=0.0).to(tl.float32)
        b = tl.load(x + at + HALF + c, mask=there & (c < HALF), other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(
    x, at, there, a, b, HALF: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """The reverse of `load_pairs`."""
    a, b = a.to(x.dtype.element_ty), b.to(x.dtype.element_ty)
    if INTERLEAVED:
        c = tl.arange(0, 2 * BLOCK)[None, None, :]
        both = tl.reshape(tl.join(a, b), [a.shape[0], a.shape[1], 2 * BLOCK])
        tl.store(x + at + c, both, mask=there & (c < 2 * HALF))
    else:
        c = tl.arange(0, BLOCK)[None, None, :]
        tl.store(x + at + c, a, mask=there & (c < HALF))
        tl.store(x + at + HALF + c, b, mask=there & (c < HALF))
