"""One chunk after the other of linear attention: see `recurrence` for what is computed."""

from __future__ import annotations

import triton
import triton.language as tl

from attnopt.codegen.pieces.decays import cumulative
from attnopt.codegen.pieces.feature_maps import mapped
from attnopt.codegen.pieces.tiles import load_tile


@triton.jit
def _rows(
    x, start, length, column,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, FULL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The tile of a chunk's rows, from the pointer and the token stride in `x`."""
    i = tl.arange(0, BLOCK_C)
    at = x[0] + tl.cast(start, tl.int64) * x[1] + i[:, None] * x[1] + column[None, :]
    there = (start + i < length)[:, None]
    return load_tile(at, there, (column < WIDTH)[None, :], MASKED, not FULL)


@triton.jit
def _per_token(x, b, h, position, length):
    at = x[0] + b * x[1] + h // x[4] * x[2] + position.to(tl.int64) * x[3]
    return tl.load(at, mask=position < length, other=0.0)


@triton.jit
def _operand(state, dtype: tl.constexpr):
    """The state in the dtype of a product's operands, and what to multiply the product with: a
    state outgrows float16 where its rows do not."""
    if dtype == tl.float16:
        unit = tl.maximum(tl.max(tl.max(tl.abs(state), 1), 0) / 1024.0, 1.0)
        return (state / unit).to(dtype), unit
    else:
        return state.to(dtype), 1.0


@triton.jit
def _weights(
    decay, held, factor, b, h, position, length, scale,
    HOOK: tl.constexpr, REVERSE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of a chunk: the cumulative log decays, what of the state is left after it, each row's `rate`,
    and the weights with which pairs enter the state and rows read it."""
    decaying = 0 if decay is None else h // decay[4]
    logs, end = cumulative(decay, held, b, decaying, position, length, HOOK, MASKED)
    rate = tl.full(position.shape, 0.0, tl.float32) + scale
    if factor is not None:
        rate *= _per_token(factor, b, h, position, length)
    since = tl.exp2(logs) if HOOK is not None else logs + 1.0
    until = tl.exp2(end - logs) if HOOK is not None else logs + 1.0
    enter = since * rate if REVERSE else until
    leave = until if REVERSE else since * rate
    if MASKED:
        enter = tl.where(position < length, enter, 0.0)
    left = tl.exp2(end) if HOOK is not None else 1.0
    return logs, left, rate, enter, leave


@triton.jit
def _absorb(
    state, sums, keys, values, enter, left, extra,
    SUMS: tl.constexpr, PLAIN: tl.constexpr, REVERSE: tl.constexpr, HOOK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state and the sums after a chunk; PLAIN where all pairs enter with weight one."""
    fresh = values
    if not PLAIN:
        fresh = (values.to(tl.float32) * enter[:, None]).to(values.dtype)
    if HOOK is not None:
        state *= left
        if SUMS != "none":
            sums *= left
    if SUMS == "values":
        weight = enter * extra if REVERSE else enter
        sums += tl.sum(values.to(tl.float32) * weight[:, None], 0)
    state = tl.dot(tl.trans(keys), fresh, state, input_precision=PRECISION)
    if SUMS == "keys":
        first = (tl.arange(0, 16) == 0)[None, :]
        column = tl.where(first, enter[:, None], 0.0).to(keys.dtype)
        sums = tl.dot(tl.trans(keys), column, sums, input_precision=PRECISION)
    return state, sums


@triton.jit
def sweep(
    state, sums, q, k, v, x, out, factor, extra, decay, held, total, dots, b, h, tile,
    first, chunks, length, scale, eps,
    HOOK: tl.constexpr, KEY_MAP: tl.constexpr, VALUE_MAP: tl.constexpr, SLOPE: tl.constexpr,
    KEY_SIDES: tl.constexpr, SUMS: tl.constexpr,
    CAUSAL: tl.constexpr, REVERSE: tl.constexpr, READ: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk through `chunks` from the token `first`; READ writes the rows that read the state."""
    i = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    e = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    absorbs: tl.constexpr = CAUSAL or not READ
    for n in tl.range(0, chunks):
        start = first + (chunks - 1 - n if REVERSE else n) * BLOCK_C
        position = start + i
        logs, left, rate, enter, leave = _weights(
            decay, held, factor, b, h, position, length, scale, HOOK, REVERSE, MASKED
        )
        side = rate
        if extra is not None:
            side = _per_token(extra, b, h, position, length)
        if absorbs:
            keys = _rows(k, start, length, d, D, BLOCK_C, D == BLOCK_D, MASKED)
            keys = mapped(keys, (d < D)[None, :], KEY_MAP, KEY_SIDES)
            values = _rows(v, start, length, e, V, BLOCK_C, V % BLOCK_V == 0, MASKED)
            values = mapped(values, (e < V)[None, :], VALUE_MAP, 1)
        if READ:
            queries = _rows(q, start, length, d, D, BLOCK_C, D == BLOCK_D, MASKED)
            queries = mapped(queries, (d < D)[None, :], KEY_MAP, KEY_SIDES)
            operand, unit = _operand(state, queries.dtype)
            result = tl.dot(queries, operand, input_precision=PRECISION) * unit
            if SUMS == "values":
                result += sums[None, :] if REVERSE else side[:, None] * sums[None, :]
            result *= leave[:, None]
            bottom = eps + leave
            if SUMS == "keys":
                operand, unit = _operand(sums, queries.dtype)
                column = tl.dot(queries, operand, input_precision=PRECISION) * unit
                bottom = eps + leave * tl.sum(column, 1)
            if CAUSAL:
                scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
                if SUMS == "values":
                    scores += side[None, :] if REVERSE else side[:, None]
                ordered = i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :]
                if HOOK is not None:
                    gap = (
                        logs[None, :] - logs[:, None] if REVERSE else logs[:, None] - logs[None, :]
                    )
                    weights = tl.exp2(tl.where(ordered, gap, float("-inf")))
                else:
                    weights = tl.where(ordered, 1.0, 0.0)
                scores *= weights * (rate[None, :] if REVERSE else rate[:, None])
                result = tl.dot(scores.to(values.dtype), values, result, input_precision=PRECISION)
                if SUMS == "keys":
                    bottom += tl.sum(scores, 1)
            _write(
                result, bottom, x, out, total, dots, b, h, tile, start, length,
                VALUE_MAP, SLOPE, SUMS, MASKED, V, BLOCK_V, BLOCK_C,
            )  # fmt: skip
        if absorbs:
            state, sums = _absorb(
                state, sums, keys, values, enter, left, side,
                SUMS, HOOK is None and not REVERSE, REVERSE, HOOK, PRECISION,
            )  # fmt: skip
    return state, sums


@triton.jit
def _write(
    result, bottom, x, out, total, dots, b, h, tile, start, length,
    MAP: tl.constexpr, SLOPE: tl.constexpr, SUMS: tl.constexpr, MASKED: tl.constexpr,
    V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store a chunk's rows: over their `bottom` where SUMS are of keys, or, as the gradient of
    features, taken back to that of `x`, with its dot products with the features into `dots`."""
    i = tl.arange(0, BLOCK_C)
    e = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    position = start + i
    if SUMS == "keys":
        result *= tl.where(bottom == 0.0, 0.0, 1.0 / bottom)[:, None]
        if total is not None and tile == 0:
            at = total[0] + b * total[1] + h * total[2] + position.to(tl.int64)
            tl.store(at, bottom, mask=position < length)
    if x is not None:
        given = _rows(x, start, length, e, V, BLOCK_C, V % BLOCK_V == 0, MASKED).to(tl.float32)
        features = mapped(given, (e < V)[None, :], MAP, 1)
        if dots is not None:
            at = dots[0] + tile * dots[1] + b * dots[2] + h * dots[3] + position.to(tl.int64)
            tl.store(at, tl.sum(features * result, 1), mask=position < length)
        if SLOPE is not None:
            result = SLOPE(given, features, result)
    at = out[0] + tl.cast(start, tl.int64) * out[1] + i[:, None] * out[1] + e[None, :]
    result = result.to(out[0].dtype.element_ty)
    if MASKED or V % BLOCK_V != 0:
        tl.store(at, result, mask=(position < length)[:, None] & (e < V)[None, :])
    else:
        tl.store(at, result)
