"""Exact attention of a few new tokens over a long cache (Flash-Decoding, 2023).

The query heads that share a key/value head, times the new tokens, are the rows of one tile, so keys
and values are read once. The readable tokens of a sequence are split evenly among programs, each of
which writes a partial result; `merge_partials` joins them, unless one program was enough. How many
there are is chosen from shapes alone, and what each reads from the lengths on the device, so that a
recorded launch serves all lengths up to the cache's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.arguments import mask_arguments, precision_argument
from attnopt.codegen.decode_spec import DecodeSpec, decode_inputs, held_bytes
from attnopt.codegen.kernel import CompilerOptions, Inputs, Kernel, Load, Outputs, Work
from attnopt.codegen.kernels.flash_prefill import unsupported
from attnopt.codegen.kernels.merge_partials import merge_partials
from attnopt.codegen.kernels.references import split_decode as plain
from attnopt.codegen.matrix_units import matrix_units
from attnopt.codegen.pieces.alibi import alibi
from attnopt.codegen.pieces.cache import position_in_ring, row_of, slot_of
from attnopt.codegen.pieces.masks import scored, within
from attnopt.codegen.pieces.online_softmax import FLOOR, LOG2E, absorb, finish
from attnopt.codegen.pieces.rows import by_token, dense_rows, partial_results
from attnopt.codegen.pieces.sizes import ceil_div, padded_size, with_strides
from attnopt.codegen.pieces.splits import split_count
from attnopt.codegen.pieces.tiles import load_tile
from attnopt.codegen.shared_memory import stages_that_fit
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss, choice
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask

_WAVES = 2  # programs that share one processor, so that one loads while the other computes
_TILE = 32768  # bytes of keys and values that a program takes at a time, at most


@triton.jit
def _sweep(
    top, total, out, q, k, v, first, last, k_page, k_token, v_page, v_token,
    length, slots, origin, shift, b, h, i, t, queries, table, selected, bias, keep, padding,
    scale, cap, left, sink, data, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SINK: tl.constexpr, GAP: tl.constexpr, RING: tl.constexpr,
    RUN: tl.constexpr, PAGE: tl.constexpr, CAPPED: tl.constexpr, KEEP_HOOK: tl.constexpr,
    SCORE_HOOK: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Absorb the readable tokens [first, last); MASKED where a row of a tile may not read them all,
    or the last tile is not whole."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    for start in tl.range(first, last, BLOCK_N):
        x = start + n
        there = x < last if MASKED else n >= 0
        slot = slot_of(x, there, origin, sink, shift, selected, RUN, GAP)
        if selected is not None:
            there = there & (slot >= origin) & (slot < length)
            slot = tl.where(there, slot, length)  # an index that names nothing
        j = position_in_ring(slot, length, sink, slots) if RING else slot
        page, row = row_of(slot, there, table, PAGE)
        k_tile = load_tile(
            k + (page * k_page + row * k_token)[None, :] + d[:, None],
            there[None, :], (d < D)[:, None], MASKED, D != BLOCK_D,
        )  # fmt: skip
        raw = tl.dot(q, k_tile.to(q.dtype), input_precision=PRECISION)
        logits, factor = scored(
            raw, b, h, i, j[None, :], t, queries, bias, keep, None, length, scale, cap, data,
            CAPPED, SCORE_HOOK, KEEP_HOOK,
        )  # fmt: skip
        if padding is not None:
            real = tl.load(padding[0] + b * padding[1] + slot * padding[2], mask=there, other=0)
            logits = tl.where((real != 0)[None, :], logits, float("-inf"))
        if MASKED:
            read = within(i, j[None, :], length, left, origin + sink, CAUSAL, WINDOW, SINK)
            logits = tl.where(read & there[None, :], logits, float("-inf"))
        v_tile = load_tile(
            v + (page * v_page + row * v_token)[:, None] + e[None, :],
            there[:, None], (e < V)[None, :], MASKED, V != BLOCK_V,
        )  # fmt: skip
        top, total, out = absorb(top, total, out, logits, factor, v_tile.to(q.dtype), PRECISION)
    return top, total, out


@triton.jit(do_not_specialize=["slots"])
def _split_decode(
    q, k, v, out, lse, lengths, starts,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    out_part, out_batch, out_head, out_token, lse_part, lse_batch, lse_head, lse_token,
    queries, slots, table, selected, counts, runs, bias, keep, padding, sinks,
    scale, v_scale, cap, left, sink, data,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr,
    RING: tl.constexpr, ONE: tl.constexpr, WHOLE: tl.constexpr, RUN: tl.constexpr,
    PAGE: tl.constexpr, CAPPED: tl.constexpr, KEEP_HOOK: tl.constexpr, SCORE_HOOK: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries * GROUP, BLOCK_M)
    split = tl.program_id(0) // blocks  # the tiles of rows of one split run side by side
    splits = tl.num_programs(0) // blocks
    kv_head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    length = slots if lengths is None else tl.load(lengths + b)
    held = tl.minimum(length, slots)
    if not RING:
        length = held
    origin = 0 if starts is None else tl.load(starts + b)

    r = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    t = r // GROUP
    h = (kv_head * GROUP + r % GROUP)[:, None]
    i = (length - queries + t)[:, None]
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    there = (t < queries)[:, None]
    token = t.to(tl.int64)[:, None]
    q_at = b * q_batch + h * q_head + token * q_token
    q_tile = load_tile(q + q_at + d[None, :], there, (d < D)[None, :], True, D != BLOCK_D)
    k += kv_head * k_head
    v += kv_head * v_head
    if table is None:
        k += b * k_batch
        v += b * v_batch
    else:
        table = (table[0] + b * table[1], table[2])

    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if sinks is not None:  # one more logit per row, of no key: the first split has it
        at = sinks[0] + b * sinks[1] + h * sinks[2] + token * sinks[3]
        own = tl.reshape(tl.load(at, mask=there, other=0.0).to(tl.float32), [BLOCK_M])
        top = tl.where(split == 0, tl.maximum(own * LOG2E, FLOOR), FLOOR)
        total += tl.where((split == 0) & (own > FLOOR), 1.0, 0.0)

    GAP: tl.constexpr = WINDOW and not RING and selected is None
    shift = 0  # tokens between the sinks and the window of the first query
    if GAP:
        shift = tl.maximum(length - queries - left + 1 - origin - (sink if SINK else 0), 0)
    readable = tl.maximum(held - origin - shift, 0)
    if selected is not None:
        readable = runs * RUN
        if counts is not None:
            count = tl.load(counts[0] + b * counts[1] + kv_head * counts[2])
            readable = tl.minimum(count * RUN, readable)
        selected = (selected[0] + b * selected[1] + kv_head * selected[2], selected[3])
    tiles = tl.cdiv(readable, BLOCK_N)
    first = split * tiles // splits * BLOCK_N
    last = tl.minimum((split + 1) * tiles // splits * BLOCK_N, readable)
    whole = first
    # A ring may have room for more than the window, which then cuts within it.
    PLAIN: tl.constexpr = selected is None and not RING and (ONE or not WINDOW)
    if PLAIN:
        common = readable - queries + 1 if CAUSAL else readable  # what every row may read
        whole += tl.maximum(tl.minimum(last, common) - first, 0) // BLOCK_N * BLOCK_N
        top, total, acc = _sweep(
            top, total, acc, q_tile, k, v, first, whole, k_batch, k_token, v_batch, v_token,
            length, slots, origin, shift, b, h, i, t[:, None], queries, table, selected, bias,
            keep, padding, scale, cap, left, sink, data, False, CAUSAL, WINDOW, SINK, GAP, RING,
            RUN, PAGE, CAPPED, KEEP_HOOK, SCORE_HOOK, D, V, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION,
        )  # fmt: skip
    top, total, acc = _sweep(
        top, total, acc, q_tile, k, v, whole, last, k_batch, k_token, v_batch, v_token,
        length, slots, origin, shift, b, h, i, t[:, None], queries, table, selected, bias,
        keep, padding, scale, cap, left, sink, data, True, CAUSAL, WINDOW, SINK, GAP, RING,
        RUN, PAGE, CAPPED, KEEP_HOOK, SCORE_HOOK, D, V, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION,
    )  # fmt: skip

    result, ended = finish(top, total, acc)
    split_at = split.to(tl.int64)
    out_at = split_at * out_part + b * out_batch + h * out_head + token * out_token
    kept = there if WHOLE else there & (total > 0)[:, None]  # what is empty is not merged
    tl.store(
        out + out_at + e[None, :], (result * v_scale).to(out.dtype.element_ty),
        mask=kept & (e < V)[None, :],
    )  # fmt: skip
    if lse is not None:
        lse_at = split_at * lse_part + b * lse_batch + h * lse_head + token * lse_token
        tl.store(lse + lse_at, ended[:, None], mask=there)


def split_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    table: Tensor | None = None,
    selected: Tensor | None = None,
    counts: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    padding: Tensor | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    longest: int = 0,
    *,
    scale: float,
    causal: bool = True,
    window: bool = False,
    left: int = 0,
    sink: int = 0,
    softcap: float = 0.0,
    ring: bool = False,
    run: int = 1,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    keep_hook: Any = None,
    score_hook: Any = None,
    data: Any = None,
    with_lse: bool = False,
    precision: str = "ieee",
    splits: int = 0,
    units: int = 132,
    waves: int = 2,
    block_n: int = 64,
    warps: int = 4,
    stages: int = 3,
    compiler: tuple[tuple[str, int], ...] = (),
) -> Any:
    """softmax(scale q k^T + bias) v of the newest tokens over the keys that each may read.

    q `[batch, heads, T, D]`; k `[batch, kv_heads, slots, D]` and v `[.., V]`, or pages
    `[pages, page, kv_heads, D]` and `[.., V]` with `table` int32 `[batch, pages of one]`; fp16,
    bf16 or fp32, or k and v in fewer bits (fp8: optional, times `k_scale` and `v_scale`); last
    dimensions dense. The result is `[batch, heads, T, V]`, in memory `[batch, T, heads, V]`, with
    the log-sum-exps `[batch, heads, T]` in float32 where `with_lse`.

    `lengths` int32 `[batch]`: tokens of each sequence, the T new ones included, which the cache
    already holds; all slots where None. A sequence padded on the left begins at slot `starts`
    int32 `[batch]`. Query t stands at position i = length - T + t and reads positions j <= i where
    `causal`; i - j < `left` or j among the first `sink` where `window`. In a `ring` token p >= sink
    lies in slot sink + (p - sink) % (slots - sink). `selected` int32 `[batch, kv_heads, n]` names
    the runs of `run` slots that are read, each once and in any order, and `counts` int32 `[batch,
    kv_heads]` how many of them count (all where None). `bias` and `keep` broadcast to
    [batch, heads, T, slots] (not for a ring), `padding` bool [batch, slots] is true at real keys,
    `sinks` broadcasts to [batch, heads, T, 1], `slopes` (of ALiBi) to [batch, heads]. Hooks as
    `flash_prefill` has them. A query without a key gives zeros.

    `longest` is for how many tokens of one sequence the launch is planned, 0 for all slots.
    `splits` 0 splits so that `units` processors with `waves` programs each are busy.
    `compiler` are further options of Triton's compiler.
    """
    (q, q_strides), (k, k_strides), (v, v_strides) = dense_rows(q), dense_rows(k), dense_rows(v)
    lengths = None if lengths is None else lengths.contiguous()
    starts = None if starts is None else starts.contiguous()
    batch, heads, queries, depth = q.shape
    _, kv_heads, slots, width = v.shape
    page = 1
    if table is not None:
        page, kv_heads = kv_heads, slots
        slots = table.shape[1] * page
        k_strides, v_strides = ((x[0], x[2], x[1]) for x in (k_strides, v_strides))
    group = heads // kv_heads
    block_m = min(64, padded_size(group * queries))
    blocks = ceil_div(group * queries, block_m)
    read, runs = longest or slots, 0
    if window and not ring:
        read = min(read, left + sink + queries)
    if selected is not None:
        runs = selected.shape[2]
        read = runs * run
    tiles = ceil_div(read, block_n)
    if splits == 0:
        splits = split_count(batch * kv_heads * blocks, units * waves, tiles)
    if slopes is not None:
        score_hook, data = alibi, with_strides(slopes, batch, heads)
    if ring and queries == 1 and slots <= left + sink:
        window = False  # the ring holds nothing else
    out = by_token(q, batch, heads, queries, width)
    parts, sums = partial_results(out, splits, with_lse)
    _split_decode[(splits * blocks, kv_heads, batch)](
        q, k, v, parts, sums, lengths, starts, *q_strides, *k_strides, *v_strides,
        *parts.stride()[:4],
        *((0, 0, 0, 0) if sums is None else sums.stride()), queries, slots,
        with_strides(table, batch, slots // page), with_strides(selected, batch, kv_heads, runs),
        with_strides(counts, batch, kv_heads), runs,
        with_strides(bias, batch, heads, queries, slots),
        with_strides(keep, batch, heads, queries, slots), with_strides(padding, batch, slots),
        with_strides(sinks, batch, heads, queries, 1),
        scale * k_scale, v_scale, softcap, left, sink, data,
        GROUP=group, CAUSAL=causal, WINDOW=window, SINK=sink > 0, RING=ring, ONE=queries == 1,
        WHOLE=splits == 1, RUN=run, PAGE=page, CAPPED=softcap > 0, KEEP_HOOK=keep_hook,
        SCORE_HOOK=score_hook, D=depth, V=width, BLOCK_D=padded_size(depth),
        BLOCK_V=padded_size(width), BLOCK_M=block_m, BLOCK_N=block_n, PRECISION=precision,
        num_warps=warps, num_stages=stages, **dict(compiler),
    )  # fmt: skip
    if sums is None:
        return out
    if splits == 1:
        return out, sums[0]
    at_once = min(1 << (splits - 1).bit_length(), max(1, 2048 // padded_size(width)))
    return merge_partials(parts, sums, out, with_lse=with_lse, block_parts=at_once)


@dataclass(frozen=True)
class SplitDecode(CompilerOptions, Kernel[DecodeSpec]):
    """`split_decode` with its tile sizes. `units` are the target's, `default` sets them."""

    name: ClassVar[str] = "split_decode"
    source: ClassVar[str] = "Flash-Decoding (Dao, Haziza, Massa and Sizov 2023)"
    launcher = staticmethod(split_decode)

    block_n: int = choice(16, 32, 64, 128, 256, default=64)
    splits: int = choice(0, 1, 2, 4, 8, 16, 32, 64, 128, default=0)
    waves: int = choice(1, 2, 3, 4, 6, 8, default=2)
    warps: int = choice(1, 2, 4, 8, default=4)
    stages: int = choice(1, 2, 3, 4, 5, 7, default=3)
    units: int = 132
    precision: str = "ieee"  # of products of float32, see `precision_argument`

    @classmethod
    def supports(cls, spec: DecodeSpec, target: Target) -> Miss | None:
        of = spec.attention
        wrong = unsupported(of)
        if wrong is not None:
            return wrong
        dropping = {"keep", "padding"} & set(of.extras)
        if of.fill == "min" and dropping:
            return Miss(
                f"`{dropping.pop()}` may drop all keys of a query, and with fill=min that is the "
                "mean of all values",
                help="say with `starts` where sequences begin that are padded on the left",
            )
        if "e4m3" in spec.cache_dtype and target.capability in ("7.5", "8.0", "8.6"):
            return Miss(f"{target.title} has no {spec.cache_dtype}", help="float8_e5m2 it has")
        if spec.cache == "ring" and {"bias", "keep"} & set(of.extras):
            return Miss("a ring cache has no columns for a bias or a mask")
        return None

    @classmethod
    def default(cls, spec: DecodeSpec, target: Target, load: Load) -> Self:
        of = spec.attention
        token = (padded_size(of.head_dim) + padded_size(of.v_dim)) * held_bytes(spec, load)
        lookups = (spec.cache == "paged") + (spec.selected > 0)  # loads that wait for other loads
        buffers = 1 if target.vendor == "amd" else 2
        narrow = held_bytes(spec, load) == 1  # what is widened takes registers
        warps = 8 if narrow or of.group * load.queries > 16 else 4
        sizes = (128, 64, 32, 16) if matrix_units(target, load.dtype) else (16,)
        for block_n in sizes:
            tile = block_n * token
            if tile <= _TILE and stages_that_fit(target, 0, tile * _WAVES, buffers) == buffers:
                stages = buffers * (1 + lookups) + 1
                return cls(block_n, 0, _WAVES, warps, stages, target.units)
        return cls(16, 0, _WAVES, warps, 1, target.units)

    @classmethod
    def inputs(cls, spec: DecodeSpec, load: Load, device: str = "cpu") -> Inputs:
        return decode_inputs(spec, load, device)

    def constants(self, spec: DecodeSpec) -> Mapping[str, Any]:
        return {
            **_meaning(spec), "block_n": self.block_n, "splits": self.splits,
            "units": self.units, "waves": self.waves, "warps": self.warps, "stages": self.stages,
            "compiler": self.compiler,
            **precision_argument(self.precision),
        }  # fmt: skip

    @classmethod
    def reference(cls, spec: DecodeSpec, inputs: Inputs) -> Outputs:
        return plain.split_decode(**inputs, **_meaning(spec))[0]

    @classmethod
    def work(cls, spec: DecodeSpec, load: Load) -> Work:
        of = spec.attention
        read = spec.selected * spec.run or of.mask.reads(load.keys)
        wide = of.head_dim + of.v_dim
        rows = load.batch * of.heads * load.queries
        cache = load.batch * of.kv_heads * read * wide * held_bytes(spec, load)
        ends = rows * wide * load.torch_dtype.itemsize
        return Work(2.0 * rows * read * wide, float(cache + ends))

    @classmethod
    def examples(cls) -> tuple[tuple[DecodeSpec, Load], ...]:
        def grouped(depth: int, mask: Mask = CAUSAL) -> AttentionSpec:
            return AttentionSpec(64, 8, depth, depth, depth**-0.5, mask)

        return (
            (DecodeSpec(grouped(64)), Load(8, 1, 32768)),
            (DecodeSpec(grouped(128)), Load(8, 1, 32768)),
            (DecodeSpec(grouped(128), "paged", 64), Load(8, 4, 32768)),
            (DecodeSpec(grouped(128), selected=32, run=64), Load(8, 1, 32768)),
            (DecodeSpec(grouped(128, Mask("window", 256, 64)), "ring"), Load(8, 1, 32768)),
            (DecodeSpec(grouped(128), cache_dtype="float8_e5m2"), Load(8, 1, 32768)),
        )


def _meaning(spec: DecodeSpec) -> dict[str, Any]:
    """The launcher's arguments that say what is computed."""
    of = spec.attention
    return {
        **mask_arguments(of.mask), "scale": of.scale, "softcap": of.softcap,
        "ring": spec.cache == "ring", "run": spec.run,
    }  # fmt: skip
