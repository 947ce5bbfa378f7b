"""Feature maps and their derivatives as passes of their own, over whole rows in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.pieces.feature_maps import feature_map
from attnopt.codegen.pieces.sizes import padded_size


@triton.jit
def _row_tile(x, strides, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Pointers to a program's rows."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    at = b * strides[0] + h * strides[1] + i.to(tl.int64)[:, None] * strides[2]
    return x + at + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _feature_rows(
    x, out, x_strides, out_strides, tokens, MAP: tl.constexpr, SIDES: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = (tl.arange(0, BLOCK_D) < D)[None, :]
    there = (i < tokens)[:, None] & channel
    row = tl.load(_row_tile(x, x_strides, BLOCK_D, BLOCK_M), mask=there, other=0.0)
    row = row.to(tl.float32)
    at = _row_tile(out, out_strides, BLOCK_D, BLOCK_M)
    tl.store(at, MAP(row, channel).to(out.dtype.element_ty), mask=there)
    if SIDES == 2:
        tl.store(at + D, MAP(-row, channel).to(out.dtype.element_ty), mask=there)


@triton.jit
def _feature_slopes(
    x, gradient, out, x_strides, gradient_strides, out_strides, tokens,
    MAP: tl.constexpr, SLOPE: tl.constexpr, SIDES: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = (tl.arange(0, BLOCK_D) < D)[None, :]
    there = (i < tokens)[:, None] & channel
    row = tl.load(_row_tile(x, x_strides, BLOCK_D, BLOCK_M), mask=there, other=0.0)
    row = row.to(tl.float32)
    at = _row_tile(gradient, gradient_strides, BLOCK_D, BLOCK_M)
    features = tl.where(channel, MAP(row, channel), 0.0)
    result = SLOPE(row, features, tl.load(at, mask=there, other=0.0))
    if SIDES == 2:
        features = tl.where(channel, MAP(-row, channel), 0.0)
        result -= SLOPE(-row, features, tl.load(at + D, mask=there, other=0.0))
    result = result.to(out.dtype.element_ty)
    tl.store(_row_tile(out, out_strides, BLOCK_D, BLOCK_M), result, mask=there)


def feature_rows(x: Tensor, feature: str, two_sided: bool) -> Tensor:
    """phi(x) `[batch, heads, S, features]` of x `[batch, heads, S, channels]`, in its dtype."""
    batch, heads, tokens, depth = x.shape
    sides = 2 if two_sided else 1
    out = torch.empty(batch, heads, tokens, sides * depth, dtype=x.dtype, device=x.device)
    _feature_rows[(triton.cdiv(tokens, 32), heads, batch)](
        x, out, x.stride()[:3], out.stride()[:3], tokens, MAP=feature_map(feature)[0],
        SIDES=sides, D=depth, BLOCK_D=padded_size(depth), BLOCK_M=32,
    )  # fmt: skip
    return out


def feature_slopes(x: Tensor, gradient: Tensor, feature: str, two_sided: bool) -> Tensor:
    """The gradient of x from that of phi(x), which is float32."""
    batch, heads, tokens, depth = x.shape
    out = torch.empty_like(x)
    phi, slope = feature_map(feature)
    _feature_slopes[(triton.cdiv(tokens, 32), heads, batch)](
        x, gradient, out, x.stride()[:3], gradient.stride()[:3], out.stride()[:3], tokens,
        MAP=phi, SLOPE=slope, SIDES=2 if two_sided else 1,
        D=depth, BLOCK_D=padded_size(depth), BLOCK_M=32,
    )  # fmt: skip
    return out
