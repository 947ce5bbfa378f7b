"""The recurrence of linear attention in chunks: what its forward pass and all its gradients are.

    o_i = rate_i (phi(q_i) S_i + extra),   S_i = decay_i S_{i-1} + phi(k_i)^T psi(v_i)

A program holds the state S of one head and one tile of values in float32 registers and walks
through a run of chunks. Within a chunk the pairs are multiplied out; what came before it enters
through the state. `reverse` runs the same in the other direction of time, which is what gradients
of keys and values ask for: with G the gradient, that of v is the reverse recurrence with queries k,
keys q and values G; that of phi(k) takes queries v, keys G and values q; and that of phi(q) is a
forward recurrence with queries G, keys v and values k.

Several of a tensor's leading sizes travel with it as a tuple, see `with_group`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.pieces.chunks import sweep
from attnopt.codegen.pieces.decays import cumulative
from attnopt.codegen.pieces.feature_maps import feature_place
from attnopt.codegen.pieces.sizes import padded_size


@triton.jit
def _at_head(x, b, h, ROW: tl.constexpr):
    """The pointer to a head's rows, and the token stride. That is a constant of the program: the
    rows of a tile are then told apart by constants, where each would take two registers."""
    return x[0] + b * x[1] + h // x[3] * x[2], ROW


@triton.jit
def _state_at(
    x, b, h, segment, f, e,
    D: tl.constexpr, V: tl.constexpr, KEY_SIDES: tl.constexpr,
):  # fmt: skip
    """Pointers to a state's tile in memory, and which of it there is."""
    row, some_rows = feature_place(f, D, KEY_SIDES)
    at = x[0] + b * x[1] + h // x[6] * x[2] + segment.to(tl.int64) * x[3]
    at += row[:, None] * x[4] + e[None, :] * x[5]
    return at, some_rows[:, None] & (e < V)[None, :]


@triton.jit
def _sums_at(
    x, b, h, segment, index, SIZE: tl.constexpr, SIDES: tl.constexpr, COLUMN: tl.constexpr
):  # fmt: skip
    """Pointers to sums in memory, and which there are; in a tile they stand in its first COLUMN."""
    place, there = feature_place(index, SIZE, SIDES)
    at = x[0] + b * x[1] + h // x[5] * x[2] + segment.to(tl.int64) * x[3] + place * x[4]
    if COLUMN:
        n = tl.arange(0, 16)
        return at[:, None] + n[None, :] * 0, there[:, None] & (n == 0)[None, :]
    else:
        return at, there


@triton.jit
def _chunks(
    q, k, v, x, out, factor, extra, decay, total, dots,
    state_in, sums_in, state_out, sums_out, logs_out, length, segment, segments, scale, eps,
    ONCE: tl.constexpr, HOOK: tl.constexpr, KEY_MAP: tl.constexpr, VALUE_MAP: tl.constexpr,
    SLOPE: tl.constexpr, KEY_SIDES: tl.constexpr, SUMS: tl.constexpr, CAUSAL: tl.constexpr,
    REVERSE: tl.constexpr, READ: tl.constexpr, TAIL: tl.constexpr,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, X_ROW: tl.constexpr,
    OUT_ROW: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head, tile of values and segment. READ starts from the segment's state and writes rows;
    otherwise the state starts at zero and is stored with the log of what the segment leaves."""
    tile = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    b = (tl.program_id(2) // segments).to(tl.int64)
    part = tl.program_id(2) % segments
    last = 0 if REVERSE else segments - 1
    if not READ and CAUSAL and part == last:
        return  # nothing comes after it
    k = _at_head(k, b, h, K_ROW)
    v = _at_head(v, b, h, V_ROW)
    if READ:
        q = _at_head(q, b, h, Q_ROW)
        out = _at_head(out, b, h, OUT_ROW)
        if x is not None:
            x = _at_head(x, b, h, X_ROW)
    F: tl.constexpr = BLOCK_D * KEY_SIDES
    f = tl.arange(0, F)
    e = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    state = tl.zeros([F, BLOCK_V], tl.float32)
    sums = tl.zeros([F, 16] if SUMS == "keys" else [BLOCK_V], tl.float32)
    if READ:
        if state_in is not None:
            at, there = _state_at(state_in, b, h, part, f, e, D, V, KEY_SIDES)
            state = tl.load(at, mask=there, other=0.0)
        if sums_in is not None:
            if SUMS == "values":
                sums_at, some = _sums_at(sums_in, b, h, part, e, V, 1, False)
            else:
                sums_at, some = _sums_at(sums_in, b, h, part, f, D, KEY_SIDES, True)
            sums = tl.load(sums_at, mask=some, other=0.0)

    held = 0.0 if ONCE is None else ONCE(decay, b, h // decay[4])
    first = part * segment
    end = tl.minimum(first + segment, length)
    whole = (end - first) // BLOCK_C
    rest = tl.cdiv(end - first, BLOCK_C) - whole
    edge = first + whole * BLOCK_C
    if TAIL and REVERSE:
        state, sums = sweep(
            state, sums, q, k, v, x, out, factor, extra, decay, held, total, dots, b, h, tile,
            edge, rest, length, scale, eps, HOOK, KEY_MAP, VALUE_MAP, SLOPE, KEY_SIDES,
            SUMS, CAUSAL, REVERSE, READ, True, D, V, BLOCK_D, BLOCK_V, BLOCK_C,
            PRECISION,
        )  # fmt: skip
    state, sums = sweep(
        state, sums, q, k, v, x, out, factor, extra, decay, held, total, dots, b, h, tile,
        first, whole, length, scale, eps, HOOK, KEY_MAP, VALUE_MAP, SLOPE, KEY_SIDES,
        SUMS, CAUSAL, REVERSE, READ, False, D, V, BLOCK_D, BLOCK_V, BLOCK_C,
        PRECISION,
    )  # fmt: skip
    if TAIL and not REVERSE:
        state, sums = sweep(
            state, sums, q, k, v, x, out, factor, extra, decay, held, total, dots, b, h, tile,
            edge, rest, length, scale, eps, HOOK, KEY_MAP, VALUE_MAP, SLOPE, KEY_SIDES,
            SUMS, CAUSAL, REVERSE, READ, True, D, V, BLOCK_D, BLOCK_V, BLOCK_C,
            PRECISION,
        )  # fmt: skip

    if READ and part != last:
        return
    if state_out is not None:
        out_at, there = _state_at(state_out, b, h, part, f, e, D, V, KEY_SIDES)
        if h % state_out[6] == 0:
            tl.store(out_at, state, mask=there)
    if sums_out is not None:
        if SUMS == "values":
            left_at, some = _sums_at(sums_out, b, h, part, e, V, 1, False)
        else:
            left_at, some = _sums_at(sums_out, b, h, part, f, D, KEY_SIDES, True)
        if h % sums_out[5] == 0 and (SUMS == "values" or tile == 0):
            tl.store(left_at, sums, mask=some)
    if logs_out is not None and tile == 0:
        log = 0.0
        for start in tl.range(first, end, BLOCK_C):
            position = start + tl.arange(0, BLOCK_C)
            log += cumulative(decay, held, b, h // decay[4], position, length, HOOK, TAIL)[1]
        tl.store(logs_out[0] + b * logs_out[1] + h * logs_out[2] + part, log)


@triton.jit
def _scan(
    states, logs, initial, whole, segments, columns, size,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn what each segment adds into the state that it starts from, in place; or add all of it
    up into `whole`."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = cell < size
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    running = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        at = initial[0] + b * initial[1] + h // initial[6] * initial[2]
        at += cell // columns * initial[4] + cell % columns * initial[5]
        running = tl.load(at, mask=there, other=0.0)
    states_at = states[0] + b * states[1] + h * states[2] + cell
    steps = segments - 1 if whole is None else segments
    for n in tl.range(0, steps):
        part = tl.cast(segments - 1 - n if REVERSE else n, tl.int64)
        added = tl.load(states_at + part * states[3], mask=there, other=0.0)
        if whole is None:
            tl.store(states_at + part * states[3], running, mask=there)
        if logs is not None:
            running *= tl.exp2(tl.load(logs[0] + b * logs[1] + h * logs[2] + part))
        running += added
    if whole is None:
        last = tl.cast(0 if REVERSE else segments - 1, tl.int64)
        tl.store(states_at + last * states[3], running, mask=there)
    else:
        tl.store(whole[0] + b * whole[1] + h * whole[2] + cell, running, mask=there)


def with_group(x: Tensor, heads: int) -> tuple[Any, ...]:
    """`x` [batch, some heads, tokens, channels] as kernels take it: the strides of batch and head,
    and how many of `heads` share one of its heads."""
    return (x, x.stride(0), x.stride(1), heads // x.shape[1])


def per_token(x: Tensor | None, heads: int) -> tuple[Any, ...] | None:
    """Numbers [batch, some heads, tokens], with the stride of a token too."""
    return None if x is None else (x, *x.stride(), heads // x.shape[1])


def with_state(x: Tensor, heads: int) -> tuple[Any, ...]:
    """States [batch, some heads, rows, columns], the same for all segments."""
    return (x, x.stride(0), x.stride(1), 0, x.stride(2), x.stride(3), heads // x.shape[1])


def with_sums(x: Tensor, heads: int) -> tuple[Any, ...]:
    """Sums [batch, some heads, features], the same for all segments."""
    return (x, x.stride(0), x.stride(1), 0, x.stride(2), heads // x.shape[1])


def chunked_recurrence(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, x: Tensor | None = None,
    decay: Tensor | None = None, factor: Tensor | None = None, extra: Tensor | None = None,
    initial: Tensor | None = None, initial_sums: Tensor | None = None,
    final: Tensor | None = None, final_sums: Tensor | None = None,
    total: Tensor | None = None, dots: Tensor | None = None,
    *, scale: float, eps: float = 0.0, hook: tuple[Any, Any] = (None, None), key_map: Any = None,
    value_map: Any = None, slope: Any = None, key_sides: int = 1, sums: str = "none",
    causal: bool = True, reverse: bool = False, precision: str = "ieee",
    block_c: int = 64, block_v: int = 64, segment: int = 0, warps: int = 4, stages: int = 2,
    compiler: tuple[tuple[str, int], ...] = (),
) -> None:  # fmt: skip
    """Fill `out` [batch, heads, S, channels of v], see the module, and what else is given.

    q, k, v and `x` [batch, some heads, S, channels], their last dimension dense. In float32:
    `decay` [batch, some heads, S]; `factor` [batch, heads, S] multiplies the rate of a query (of a
    key if `reverse`), and `extra`, alike, is added to its products with all keys; `initial` and
    `final` [batch, some heads, features, features of v] with their sums; `total` [batch, heads, S]
    takes what rows are divided by. `sums` "keys" divides rows by phi(q) times the sum of phi(k);
    "values" keeps the sum of values, which `extra` asks for. `x` makes `out` the gradient of `x`
    by that of the features value_map(x), with `dots` [tiles, batch, heads, S] as products of both.
    With `segment` tokens at a time, a multiple of `block_c`, other programs first sum up what each
    segment adds, so that a few heads keep a device busy.
    """
    batch, heads, length, width = out.shape
    depth = q.shape[3]
    span = segment if 0 < segment < length else triton.cdiv(length, block_c) * block_c
    segments = triton.cdiv(length, span)
    tiles = triton.cdiv(width, block_v)
    shared = {
        "ONCE": hook[0], "HOOK": hook[1],
        "KEY_MAP": key_map, "VALUE_MAP": value_map, "SLOPE": slope,
        "KEY_SIDES": key_sides, "SUMS": sums, "CAUSAL": causal,
        "REVERSE": reverse, "TAIL": length % block_c != 0, "D": depth, "V": width,
        "K_ROW": k.stride(2), "V_ROW": v.stride(2), "Q_ROW": q.stride(2),
        "X_ROW": 0 if x is None else x.stride(2), "OUT_ROW": out.stride(2),
        "BLOCK_D": padded_size(depth), "BLOCK_V": block_v, "BLOCK_C": block_c,
        "PRECISION": precision, "num_warps": warps, "num_stages": stages, **dict(compiler),
    }  # fmt: skip
    numbers = (length, span, segments, scale, eps)
    state_in = None if initial is None else with_state(initial, heads)
    sums_in = None if initial_sums is None else with_sums(initial_sums, heads)
    if segments > 1 or not causal:
        holders = max(y.shape[1] for y in (k, v, decay, initial) if y is not None)
        rows, columns = depth * key_sides, width
        made: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
        states = torch.empty(batch, holders, segments, rows, columns, **made)
        summed = torch.empty(
            batch, holders, segments, columns if sums == "values" else rows, **made
        )
        logs = None if decay is None else torch.empty(batch, holders, segments, **made)
        logs_out = None if logs is None else (logs, *logs.stride()[:2])
        _chunks[(tiles, holders, batch * segments)](
            None, with_group(k, holders), with_group(v, holders), None, None,
            per_token(factor, holders) if reverse else None,
            per_token(extra, holders) if reverse else None, per_token(decay, holders),
            None, None, None, None, (states, *states.stride(), 1),
            None if sums == "none" else (summed, *summed.stride(), 1), logs_out, *numbers,
            READ=False, **shared,
        )  # fmt: skip
        state_in = _scanned(states, initial, logs_out, causal, reverse, heads)
        if sums != "none":
            first = None if initial_sums is None else initial_sums[..., None]
            found = _scanned(summed[..., None], first, logs_out, causal, reverse, heads)
            sums_in = (*found[:5], found[6])
    _chunks[(tiles, heads, batch * segments)](
        with_group(q, heads), with_group(k, heads), with_group(v, heads),
        None if x is None else with_group(x, heads), with_group(out, heads),
        per_token(factor, heads), per_token(extra, heads), per_token(decay, heads),
        None if total is None else (total, *total.stride()[:2]),
        None if dots is None else (dots, *dots.stride()[:3]), state_in, sums_in,
        None if final is None else with_state(final, heads),
        None if final_sums is None else with_sums(final_sums, heads), None,
        *numbers, READ=True, **shared,
    )  # fmt: skip


def _scanned(
    states: Tensor, initial: Tensor | None, logs: tuple[Any, ...] | None, causal: bool,
    reverse: bool, heads: int,
) -> tuple[Any, ...]:  # fmt: skip
    """Scan what each segment adds [batch, some heads, segments, rows, columns]: the states that the
    segments start from, as kernels take them."""
    batch, holders, segments, rows, columns = states.shape
    whole = None if causal else torch.empty_like(states[:, :, 0])
    block = 512  # cells of a program: small, for the loop over segments is all that it has to do
    _scan[(triton.cdiv(rows * columns, block), holders, batch)](
        (states, *states.stride()[:3]), logs,
        None if initial is None else with_state(initial, holders),
        None if whole is None else (whole, *whole.stride()[:2]),
        segments, columns, rows * columns, REVERSE=reverse, BLOCK=block,
    )  # fmt: skip
    if whole is not None:
        return with_state(whole, heads)
    return (states, *states.stride(), heads // holders)
