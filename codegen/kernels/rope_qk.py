"""Rotary embedding of new queries and keys (RoFormer, Su et al. 2021, equation 34), in one launch
with what stands around it: the norm of each head before, and the write of keys and values into a
cache after.

One program holds a tile of tokens times heads; the heads of queries, of keys and of values take
turns along the second axis of the grid. Tokens of all sequences are counted through, so that a step
of decoding fills tiles as a prompt does. The sines of a token are read once for the heads of a
tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.kernel import Inputs, Kernel, Load, Outputs, Work
from attnopt.codegen.kernels.references import rope_qk as plain
from attnopt.codegen.pieces.rotary import load_pairs, store_pairs
from attnopt.codegen.rope_spec import RopeSpec
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss, choice


@triton.jit
def _rotate_heads(
    x, at, there, first_out, first_at, first_there, second_out, second_at, second_there,
    cos, sin, weight, eps,
    D: tl.constexpr, HALF: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr, UNIT_OFFSET: tl.constexpr,
    IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Heads at x + at [T, H, 1], normed and rotated, written to one or two places (each None or a
    pointer). IN_PLACE where the first of these is x."""
    a, b = load_pairs(x + FIRST, at, there, HALF, BLOCK, INTERLEAVED)
    REST: tl.constexpr = D - 2 * HALF
    if REST > 0:  # channels on both sides of the rotated ones
        r = tl.arange(0, BLOCK_REST)[None, None, :]
        c = tl.where(r < FIRST, r, r + 2 * HALF)
        rest = tl.load(x + at + c, mask=there & (r < REST), other=0.0).to(tl.float32)
    if weight is not None:
        squares = tl.sum(a * a + b * b, 2)
        if REST > 0:
            squares += tl.sum(rest * rest, 2)
        norm = tl.rsqrt(squares / D + eps)[:, :, None]
        start = tl.zeros([1, 1, 1], tl.int32)
        of_a, of_b = load_pairs(weight + FIRST, start, start == 0, HALF, BLOCK, INTERLEAVED)
        a *= norm * (of_a + UNIT_OFFSET)
        b *= norm * (of_b + UNIT_OFFSET)
        if REST > 0:
            of_rest = tl.load(weight + c, mask=r < REST, other=0.0).to(tl.float32)
            rest *= norm * (of_rest + UNIT_OFFSET)
    turned = a * cos - b * sin
    b = b * cos + a * sin
    if first_out is not None:
        store_pairs(first_out + FIRST, first_at, first_there, turned, b, HALF, BLOCK, INTERLEAVED)
        if REST > 0 and (weight is not None or not IN_PLACE):
            kept = rest.to(first_out.dtype.element_ty)
            tl.store(first_out + first_at + c, kept, mask=first_there & (r < REST))
    if second_out is not None:
        store_pairs(
            second_out + FIRST, second_at, second_there, turned, b, HALF, BLOCK, INTERLEAVED
        )
        if REST > 0:
            kept = rest.to(second_out.dtype.element_ty)
            tl.store(second_out + second_at + c, kept, mask=second_there & (r < REST))


@triton.jit
def _place(
    b, t, there, slots, slots_batch, slots_token, pages, pages_batch, pages_slot, sequence_pages,
    last, size, sink, RING: tl.constexpr,
):  # fmt: skip
    """Where in the cache the tokens go: the row of its first dimension, the slot, and whether."""
    place = tl.load(slots + b * slots_batch + t * slots_token, mask=there, other=-1).to(tl.int64)
    there = there & (place >= 0)
    row = b
    if pages is not None:
        at = place // size
        there = there & (at < sequence_pages)
        row = tl.load(pages + b * pages_batch + at * pages_slot, mask=there, other=-1).to(tl.int64)
        there = there & (row >= 0)
        place = place % size
    elif RING:
        if last is not None:  # of tokens that meet in a slot, the last one stays
            end = tl.load(last + b, mask=there, other=0)
            there = there & ((place < sink) | (place + size - sink > end))
        place = tl.where(place < sink, place, sink + (place - sink) % (size - sink))
    else:
        there = there & (place < size)
    return row, place, there


@triton.jit
def _rope_qk(
    q, k, v, q_out, k_out, k_cache, v_cache, cos, sin, positions, slots, pages, last,
    q_weight, k_weight,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    k_cache_row, k_cache_head, k_cache_slot, v_cache_row, v_cache_head, v_cache_slot,
    cos_row, sin_row, positions_batch, positions_token, slots_batch, slots_token,
    pages_batch, pages_slot, sequence_pages,
    tokens, length, table, size, sink, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    HALF: tl.constexpr, FIRST: tl.constexpr, INTERLEAVED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, RING: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    Q_TILES: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    KV_TILES: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    turn = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = token < tokens
    b = (token // length).to(tl.int64)
    t = (token % length).to(tl.int64)
    if turn < Q_TILES + KV_TILES:
        at = positions + b * positions_batch + t * positions_token
        position = tl.load(at, mask=there, other=-1).to(tl.int64)[:, None]
        known = (position >= 0) & (position < table)
        c = tl.arange(0, BLOCK)[None, :]
        known = known & (c < HALF)
        c_tile = tl.load(cos + position * cos_row + c, mask=known, other=float("nan"))
        s_tile = tl.load(sin + position * sin_row + c, mask=known, other=float("nan"))
        c_tile = c_tile.to(tl.float32)[:, None, :]
        s_tile = s_tile.to(tl.float32)[:, None, :]
        if turn < Q_TILES:
            h = (turn * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
            inside = there[:, None, None] & (h < HEADS)
            _rotate_heads(
                q, (b * q_batch + t * q_token)[:, None, None] + h * q_head, inside,
                q_out, (b * q_out_batch + t * q_out_token)[:, None, None] + h * q_out_head, inside,
                None, None, None, c_tile, s_tile, q_weight, eps,
                D, HALF, FIRST, BLOCK, BLOCK_REST, INTERLEAVED, UNIT_OFFSET, IN_PLACE,
            )  # fmt: skip
        else:
            h = ((turn - Q_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[None, :, None]
            inside = there[:, None, None] & (h < KV_HEADS)
            cache_at = h
            cached = inside
            if k_cache is not None:
                row, slot, written = _place(
                    b, t, there, slots, slots_batch, slots_token, pages, pages_batch, pages_slot,
                    sequence_pages, last, size, sink, RING,
                )  # fmt: skip
                cache_at = (row * k_cache_row + slot * k_cache_slot)[
                    :, None, None
                ] + h * k_cache_head
                cached = written[:, None, None] & (h < KV_HEADS)
            _rotate_heads(
                k, (b * k_batch + t * k_token)[:, None, None] + h * k_head, inside,
                k_out, (b * k_out_batch + t * k_out_token)[:, None, None] + h * k_out_head, inside,
                k_cache, cache_at, cached, c_tile, s_tile, k_weight, eps,
                D, HALF, FIRST, BLOCK, BLOCK_REST, INTERLEAVED, UNIT_OFFSET, IN_PLACE,
            )  # fmt: skip
    elif v_cache is not None:
        h = (turn - Q_TILES - KV_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
        h = h.to(tl.int64)[None, :, None]
        e = tl.arange(0, BLOCK_V)[None, None, :]
        row, slot, written = _place(
            b, t, there, slots, slots_batch, slots_token, pages, pages_batch, pages_slot,
            sequence_pages, last, size, sink, RING,
        )  # fmt: skip
        moved = written[:, None, None] & (h < KV_HEADS) & (e < V)
        v_at = (b * v_batch + t * v_token)[:, None, None] + h * v_head + e
        value = tl.load(v + v_at, mask=moved, other=0.0)
        cache_at = (row * v_cache_row + slot * v_cache_slot)[:, None, None] + h * v_cache_head + e
        tl.store(v_cache + cache_at, value.to(v_cache.dtype.element_ty), mask=moved)


def rope_qk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
    pages: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    ring: bool = False,
    sink: int = 0,
    interleaved: bool = False,
    first: int = 0,
    eps: float = 1e-6,
    unit_offset: bool = False,
    keep_keys: bool = False,
    in_place: bool = False,
    block_t: int = 4,
    block_h: int = 8,
    warps: int = 4,
) -> Any:
    """Rotate new queries and keys by their positions, and write keys and values into a cache.

    q `[batch, heads, S, D]`, k `[batch, kv_heads, S, D]`, v `[batch, kv_heads, S, V]` in fp16, bf16
    or fp32, their last dimension dense; cos and sin `[positions, rotary / 2]`, which hold any
    scaling; `positions` int32 or int64 `[batch or 1, S]`. Channels from `first` on are rotated in
    pairs: c and c + rotary / 2, or neighbours where `interleaved`. A position outside the tables
    gives NaN. Where a weight `[D]` is given, the heads of q or k are divided by their root mean
    square first and multiplied by the weight, plus one where `unit_offset`.

    Caches hold their own dtype, and are written in place at the index `slots` (int32 or int64,
    `[batch or 1, S]`), by default the positions; tokens of a negative index are not written.
    Contiguous: `[batch, kv_heads, slots, dim]`. A `ring`: the same, where index i stands at slot i
    below `sink` and at sink + (i - sink) % (slots - sink) from there on; when one call goes round,
    the largest indices stay. Paged: `[all pages, kv_heads, page size, dim]` and `pages` int32
    `[batch, pages of a sequence]`, the page of each run of indices, negative where there is none.
    An index that has no slot is not written.

    Gives the queries and both caches; after the queries the rotated keys, where `keep_keys` or
    where there is no cache. `in_place` writes these over q and k. Raises `ValueError` where one
    cache is given without the other, a ring has no slots beyond its sink, or what is to be
    overwritten is not dense.
    """
    if (k_cache is None) != (v_cache is None):
        raise ValueError("one cache is given without the other")
    if ring and k_cache is not None and sink >= k_cache.shape[2]:
        raise ValueError(f"a ring of {k_cache.shape[2]} slots cannot keep {sink} and turn")
    if in_place and (q.stride(3) != 1 or k.stride(3) != 1):
        raise ValueError("what is overwritten must be dense in its last dimension")
    q, k, v, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, cos, sin))
    batch, heads, length, depth = q.shape
    kv_heads, width, half = k.shape[1], v.shape[3], cos.shape[1]
    q_out, k_out = q, k
    if not in_place:
        q_out = torch.empty(batch, length, heads, depth, dtype=q.dtype, device=q.device)
        k_out = torch.empty(batch, length, kv_heads, depth, dtype=k.dtype, device=k.device)
        q_out, k_out = q_out.transpose(1, 2), k_out.transpose(1, 2)
    kept = k_out if keep_keys or k_cache is None else None
    spread = positions.expand(batch, length)
    places = spread if slots is None else slots.expand(batch, length)
    size = 1 if k_cache is None else k_cache.shape[2]
    last = None
    if ring and k_cache is not None and length > size - sink:
        last = places.amax(1).to(torch.int64)
    rest, of_values = depth - 2 * half, 0 if k_cache is None else 1
    turns = triton.cdiv(heads, block_h) + (1 + of_values) * triton.cdiv(kv_heads, block_h)
    _rope_qk[(triton.cdiv(batch * length, block_t), turns)](
        q, k, v, q_out, kept, k_cache, v_cache, cos, sin, spread, places, pages, last,
        q_weight, k_weight,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *q_out.stride()[:3],
        *((0, 0, 0) if kept is None else kept.stride()[:3]),
        *((0, 0, 0) if k_cache is None else k_cache.stride()[:3]),
        *((0, 0, 0) if v_cache is None else v_cache.stride()[:3]),
        cos.stride(0), sin.stride(0), *spread.stride(), *places.stride(),
        *((0, 0, 0) if pages is None else (*pages.stride(), pages.shape[1])),
        batch * length, length, cos.shape[0], size, sink, eps,
        HEADS=heads, KV_HEADS=kv_heads, D=depth, V=width, HALF=half, FIRST=first,
        INTERLEAVED=interleaved, UNIT_OFFSET=unit_offset, RING=ring, IN_PLACE=in_place,
        BLOCK=triton.next_power_of_2(half), BLOCK_REST=triton.next_power_of_2(max(rest, 1)),
        BLOCK_V=triton.next_power_of_2(width), BLOCK_T=block_t, BLOCK_H=block_h,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    return tuple(x for x in (q_out, kept, k_cache, v_cache) if x is not None)


@dataclass(frozen=True)
class RopeQK(Kernel[RopeSpec]):
    """`rope_qk` with its tile sizes."""

    name: ClassVar[str] = "rope_qk"
    source: ClassVar[str] = "RoFormer (Su et al. 2021)"
    launcher = staticmethod(rope_qk)

    block_t: int = choice(1, 2, 4, 8, 16, default=4)
    block_h: int = choice(1, 2, 4, 8, 16, default=8)
    warps: int = choice(1, 2, 4, 8, default=4)

    @classmethod
    def supports(cls, spec: RopeSpec, target: Target) -> Miss | None:
        if max(spec.head_dim, spec.v_dim) > 1024:
            return Miss(f"head_dim {max(spec.head_dim, spec.v_dim)} is more than 1024")
        return None

    @classmethod
    def default(cls, spec: RopeSpec, target: Target, load: Load) -> Self:
        tokens = load.batch * load.queries
        block_h = min(8, triton.next_power_of_2(spec.kv_heads))
        room = max(1, 4096 // (triton.next_power_of_2(spec.head_dim) * block_h))
        block_t = min(
            room, 16, triton.next_power_of_2(max(1, tokens // (2 * max(target.units, 1))))
        )
        return cls(block_t, block_h, 4 if block_t * block_h >= 16 else 2)

    @classmethod
    def inputs(cls, spec: RopeSpec, load: Load, device: str = "cpu") -> Inputs:
        made = partial(torch.randn, dtype=load.torch_dtype, device=device)
        batch, new, size = load.batch, load.queries, spec.size
        angles = torch.rand(load.keys, spec.rotary // 2, device=device) * 6.3
        given = {
            "q": made(batch, spec.heads, new, spec.head_dim),
            "k": made(batch, spec.kv_heads, new, spec.head_dim),
            "v": made(batch, spec.kv_heads, new, spec.v_dim),
            "cos": angles.cos(), "sin": angles.sin(),
            "positions": torch.arange(load.keys - new, load.keys, device=device).repeat(batch, 1),
        }  # fmt: skip
        if spec.norm:
            given |= {"q_weight": made(spec.head_dim), "k_weight": made(spec.head_dim)}
        if spec.cache == "none":
            return given
        rows, slots = batch, load.keys if spec.cache == "contiguous" else size
        if spec.cache == "paged":
            each = triton.cdiv(load.keys, size)
            rows = batch * each
            given["pages"] = torch.randperm(rows, dtype=torch.int32, device=device).view(-1, each)
        empty = partial(torch.zeros, dtype=load.torch_dtype, device=device)
        caches = (spec.kv_heads, slots)
        return given | {
            "k_cache": empty(rows, *caches, spec.head_dim),
            "v_cache": empty(rows, *caches, spec.v_dim),
        }

    def constants(self, spec: RopeSpec) -> Mapping[str, Any]:
        return {
            **computed(spec), "in_place": spec.in_place, "block_t": self.block_t,
            "block_h": self.block_h, "warps": self.warps,
        }  # fmt: skip

    @classmethod
    def reference(cls, spec: RopeSpec, inputs: Inputs) -> Outputs:
        return plain.rope_qk(**inputs, **computed(spec))

    @classmethod
    def work(cls, spec: RopeSpec, load: Load) -> Work:
        tokens, item = load.batch * load.queries, load.torch_dtype.itemsize
        heads, cached = spec.heads + spec.kv_heads, spec.cache != "none"
        written = heads + spec.kv_heads * (spec.keep_keys and cached)
        moved = (heads + written) * spec.head_dim + 2 * spec.kv_heads * spec.v_dim * cached
        flops = heads * (3 * spec.rotary + 4 * spec.head_dim * spec.norm)
        tables = load.queries * spec.rotary * 4 + tokens * 8
        return Work(float(tokens * flops), float(tokens * moved * item + tables))

    @classmethod
    def examples(cls) -> tuple[tuple[RopeSpec, Load], ...]:
        step, prompt = Load(16, 1, 8192), Load(1, 8192, 8192)
        return (
            (RopeSpec(32, 8, 128, 128, 128), prompt),
            (RopeSpec(32, 8, 64, 64, 64), prompt),
            (RopeSpec(32, 8, 128, 128, 128, cache="paged", size=64, norm=True), step),
            (RopeSpec(32, 8, 64, 64, 64, cache="ring", size=320, sink=64, keep_keys=True), prompt),
            (RopeSpec(32, 32, 80, 80, 32, in_place=True), prompt),
            (RopeSpec(16, 2, 128, 128, 64, interleaved=True, unit_offset=True, norm=True), step),
        )


def computed(spec: RopeSpec) -> dict[str, Any]:
    """The launcher's arguments that say what is computed."""
    return {
        "ring": spec.cache == "ring", "sink": spec.sink, "interleaved": spec.interleaved,
        "first": spec.first, "eps": spec.eps, "unit_offset": spec.unit_offset,
        "keep_keys": spec.keep_keys,
    }  # fmt: skip
