"""Latent attention (MLA) of a few new tokens over a cache of latents, in absorbed form
(DeepSeek-V2, section 2.1; FlashMLA).

The keys of all heads are the latents themselves beside one rotary key, and the values are the same
latents: a tile of latents is loaded once, for both products and for all heads of a tile of rows.
Rows are heads times new tokens. The output stays in latent space, so the accumulator is as wide as
the rank. A rank that is no power of two is taken in two such pieces, 192 as 128 and 64. The
sequence is split among programs as `split_decode` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.arguments import precision_argument
from attnopt.codegen.kernel import CompilerOptions, Inputs, Kernel, Load, Outputs, Work
from attnopt.codegen.kernels.merge_partials import merge_partials
from attnopt.codegen.kernels.references import latent_decode as plain
from attnopt.codegen.latent_spec import LatentSpec
from attnopt.codegen.matrix_units import below_ampere, matrix_units
from attnopt.codegen.pieces.cache import row_of
from attnopt.codegen.pieces.online_softmax import FLOOR, finish, weigh
from attnopt.codegen.pieces.rows import by_token, partial_results
from attnopt.codegen.pieces.sizes import ceil_div, padded_size, two_pieces, with_strides
from attnopt.codegen.pieces.splits import split_count
from attnopt.codegen.pieces.tiles import load_tile
from attnopt.codegen.shared_memory import stages_that_fit
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss, choice

_TILE = 40960  # bytes of latents that a program takes at a time, at most
_LARGE = 200_000  # bytes of shared memory where products of 64 rows run beside everything else


@triton.jit(do_not_specialize=["slots"])
def _latent_decode(
    q_latent, q_rope, latents, k_rope, out, lse, lengths, starts,
    q_batch, q_head, q_token, qr_batch, qr_head, qr_token,
    c_page, c_token, r_page, r_token,
    out_part, out_batch, out_head, out_token, lse_part, lse_batch, lse_head, lse_token,
    heads, queries, slots, table, padding, factor,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr, PAGE: tl.constexpr, R: tl.constexpr,
    P: tl.constexpr, BLOCK_R: tl.constexpr, MORE_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries * heads, BLOCK_M)
    split = tl.program_id(0) // blocks  # the tiles of rows of one split run side by side
    splits = tl.num_programs(0) // blocks
    b = tl.program_id(1).to(tl.int64)
    length = slots if lengths is None else tl.minimum(tl.load(lengths + b), slots)
    origin = 0 if starts is None else tl.load(starts + b)

    line = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    t = line // heads
    i = (length - queries + t)[:, None]
    there = (t < queries)[:, None]
    h = (line % heads).to(tl.int64)[:, None]
    token = t.to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_R)
    p = tl.arange(0, BLOCK_P)
    q_at = q_latent + b * q_batch + h * q_head + token * q_token
    q = load_tile(q_at + d[None, :], there, (d < R)[None, :], True, BLOCK_R > R)
    rope_at = q_rope + b * qr_batch + h * qr_head + token * qr_token
    q_rope = load_tile(rope_at + p[None, :], there, (p < P)[None, :], True, P != BLOCK_P)
    if table is None:
        latents += b * c_page
        k_rope += b * r_page
    else:
        table = (table[0] + b * table[1], table[2])

    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if MORE_R > 0:
        m = BLOCK_R + tl.arange(0, MORE_R)
        q_more = load_tile(q_at + m[None, :], there, (m < R)[None, :], True, BLOCK_R + MORE_R > R)
        acc_more = tl.zeros([BLOCK_M, MORE_R], tl.float32)

    readable = tl.maximum(length - origin, 0)
    tiles = tl.cdiv(readable, BLOCK_N)
    first = split * tiles // splits * BLOCK_N
    last = tl.minimum((split + 1) * tiles // splits * BLOCK_N, readable)
    common = tl.minimum(last, readable - queries + 1) if CAUSAL else last  # what every row reads
    n = tl.arange(0, BLOCK_N)
    for start in tl.range(first, last, BLOCK_N):
        x = start + n
        slot = origin + tl.minimum(x, last - 1)  # a token behind the last one is loaded as the last
        page, row = row_of(slot, n >= 0, table, PAGE)
        c_at = latents + (page * c_page + row * c_token)[:, None]
        tile = load_tile(c_at + d[None, :], (n >= 0)[:, None], (d < R)[None, :], False, BLOCK_R > R)
        logits = tl.dot(q, tl.trans(tile), input_precision=PRECISION) * factor
        if MORE_R > 0:
            m = BLOCK_R + tl.arange(0, MORE_R)
            more = load_tile(
                c_at + m[None, :], (n >= 0)[:, None], (m < R)[None, :], False, BLOCK_R + MORE_R > R
            )
            logits += tl.dot(q_more, tl.trans(more), input_precision=PRECISION) * factor
        r_tile = load_tile(
            k_rope + (page * r_page + row * r_token)[None, :] + p[:, None],
            (n >= 0)[None, :], (p < P)[:, None], False, P != BLOCK_P,
        )  # fmt: skip
        logits += tl.dot(q_rope, r_tile, input_precision=PRECISION) * factor
        if padding is not None:
            real = tl.load(padding[0] + b * padding[1] + slot * padding[2])
            logits = tl.where((real != 0)[None, :], logits, float("-inf"))
        if start + BLOCK_N > common:
            read = (x < last)[None, :]
            if CAUSAL:
                read = read & (slot[None, :] <= i)
            logits = tl.where(read, logits, float("-inf"))
        top, total, kept, weights = weigh(top, total, logits, 1.0)
        weights = weights.to(tile.dtype)
        acc = tl.dot(weights, tile, acc * kept[:, None], input_precision=PRECISION)
        if MORE_R > 0:
            acc_more = tl.dot(weights, more, acc_more * kept[:, None], input_precision=PRECISION)

    result, ended = finish(top, total, acc)
    split_at = split.to(tl.int64)
    out_at = out + split_at * out_part + b * out_batch + h * out_head + token * out_token
    kept = there if WHOLE else there & (total > 0)[:, None]  # what is empty is not merged
    tl.store(out_at + d[None, :], result.to(out.dtype.element_ty), mask=kept & (d < R)[None, :])
    if MORE_R > 0:
        result, ended = finish(top, total, acc_more)
        m = BLOCK_R + tl.arange(0, MORE_R)
        tl.store(out_at + m[None, :], result.to(out.dtype.element_ty), mask=kept & (m < R)[None, :])
    if lse is not None:
        lse_at = split_at * lse_part + b * lse_batch + h * lse_head + token * lse_token
        tl.store(lse + lse_at, ended[:, None], mask=there)


def latent_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    k_rope: Tensor,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    table: Tensor | None = None,
    padding: Tensor | None = None,
    longest: int = 0,
    *,
    scale: float,
    causal: bool = True,
    with_lse: bool = False,
    precision: str = "ieee",
    splits: int = 0,
    units: int = 132,
    waves: int = 1,
    block_m: int = 64,
    block_n: int = 64,
    warps: int = 8,
    stages: int = 2,
    compiler: tuple[tuple[str, int], ...] = (),
) -> Any:
    """softmax(scale (q_latent latents^T + q_rope k_rope^T)) latents of the newest tokens.

    q_latent `[batch, heads, T, rank]` and q_rope `[batch, heads, T, rope]`; latents
    `[batch, slots, rank]` and k_rope `[batch, slots, rope]`, or pages `[pages, page, rank]` and
    `[pages, page, rope]` with `table` int32 `[batch, pages of one]`; fp16, bf16 or fp32, last
    dimensions dense (both may be slices of one tensor). The result is `[batch, heads, T, rank]`, in
    memory `[batch, T, heads, rank]`, with the log-sum-exps `[batch, heads, T]` in float32 where
    `with_lse`; each head's value projection is left to the caller.

    `lengths` int32 `[batch]`: tokens of each sequence, the T new ones included, which the cache
    already holds; all slots where None. A sequence padded on the left begins at slot `starts` int32
    `[batch]`; `padding` bool [batch, slots] is true at real tokens. Query t reads tokens up to
    length - T + t where `causal`. A query without a token gives zeros.

    `longest` is for how many tokens of one sequence the launch is planned, 0 for all slots.
    `splits` 0 splits so that `units` processors with `waves` programs each are busy.
    `compiler` are further options of Triton's compiler.
    """
    q_latent, q_rope, latents, k_rope = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent, q_rope, latents, k_rope)
    )
    batch, heads, queries, rank = q_latent.shape
    rope = q_rope.shape[3]
    page = 1 if table is None else latents.shape[1]
    slots = latents.shape[1] if table is None else table.shape[1] * page
    blocks = ceil_div(heads * queries, block_m)
    tiles = ceil_div(longest or slots, block_n)
    lengths = None if lengths is None else lengths.contiguous()
    starts = None if starts is None else starts.contiguous()
    if splits == 0:
        # a partial result is written and read in float32
        merging = 8 * block_m * rank // (block_n * (rank + rope) * latents.element_size())
        splits = split_count(batch * blocks, units * waves, tiles, 2 + merging)
    out = by_token(q_latent, batch, heads, queries, rank)
    parts, sums = partial_results(out, splits, with_lse)
    block_r, more_r = two_pieces(rank)
    _latent_decode[(splits * blocks, batch)](
        q_latent, q_rope, latents, k_rope, parts, sums, lengths, starts,
        *q_latent.stride()[:3], *q_rope.stride()[:3], *latents.stride()[:2], *k_rope.stride()[:2],
        *parts.stride()[:4], *((0, 0, 0, 0) if sums is None else sums.stride()),
        heads, queries, slots, with_strides(table, batch, slots // page),
        with_strides(padding, batch, slots), scale * math.log2(math.e),
        CAUSAL=causal, WHOLE=splits == 1, PAGE=page, R=rank, P=rope, BLOCK_R=block_r,
        MORE_R=more_r, BLOCK_P=padded_size(rope), BLOCK_M=block_m, BLOCK_N=block_n,
        PRECISION=precision, num_warps=warps, num_stages=stages, **dict(compiler),
    )  # fmt: skip
    if sums is None:
        return out
    if splits == 1:
        return out, sums[0]
    at_once = min(1 << (splits - 1).bit_length(), max(1, 2048 // padded_size(rank)))
    return merge_partials(parts, sums, out, with_lse=with_lse, block_parts=at_once)


@dataclass(frozen=True)
class LatentDecode(CompilerOptions, Kernel[LatentSpec]):
    """`latent_decode` with its tile sizes. `units` are the target's, `default` sets them."""

    name: ClassVar[str] = "latent_decode"
    source: ClassVar[str] = "DeepSeek-V2 (2024), section 2.1"
    launcher = staticmethod(latent_decode)

    block_m: int = choice(16, 32, 64, 128, default=64)
    block_n: int = choice(16, 32, 64, 128, default=64)
    splits: int = choice(0, 1, 2, 4, 8, 16, 32, 64, 128, default=0)
    waves: int = choice(1, 2, 3, 4, default=1)
    warps: int = choice(1, 2, 4, 8, 16, default=8)
    stages: int = choice(1, 2, 3, 4, 5, default=2)
    units: int = 132
    precision: str = "ieee"  # of products of float32, see `precision_argument`

    @classmethod
    def supports(cls, spec: LatentSpec, target: Target) -> Miss | None:
        if spec.scale <= 0:
            return Miss(f"the softmax scale {spec.scale} is not positive")
        if spec.rank > 1024:
            return Miss(
                f"a result of rank {spec.rank}, more than 1024, does not fit into registers"
            )
        if cls._fitting(spec, target, Load(1, 1)) is None:
            return Miss(
                f"16 latents of rank {spec.rank} and as many queries do not fit into the "
                f"{target.shared_per_block} bytes of shared memory of {target.title}"
            )
        if spec.rank > 256:
            return below_ampere(target, "a rank of more than 256 does not fit into registers")
        return None

    @classmethod
    def default(cls, spec: LatentSpec, target: Target, load: Load) -> Self:
        warps = 4 if target.vendor == "amd" else 8
        return cls._fitting(spec, target, load) or cls(16, 16, 0, 1, warps, 1, target.units)

    @classmethod
    def _fitting(cls, spec: LatentSpec, target: Target, load: Load) -> Self | None:
        """Tiles that fill the shared memory without spilling registers."""
        rows, amd = spec.heads * load.queries, target.vendor == "amd"
        line = (sum(two_pieces(spec.rank)) + padded_size(spec.rope)) * load.torch_dtype.itemsize
        async_products = target.shared_per_block >= _LARGE and load.torch_dtype.itemsize == 2
        block_m, warps = (16, 4) if rows <= 16 else (32, 8)
        if rows > 32 and not amd and spec.rank <= 512:
            block_m, warps = (64, 8) if async_products else (32, 4)
        if block_m * spec.rank > 128 * 32 * warps:
            block_m, warps = 16, 8
        sizes: tuple[int, ...] = (128, 64, 32, 16)
        if not matrix_units(target, load.dtype):  # every thread keeps its rows and columns
            block_m, warps, sizes = 16, (4 if spec.rank <= 256 else 8), (16,)
        buffers = 1 if amd else 3 if block_m == 64 else 2
        for block_n in sizes:
            tile, kept = block_n * line, 0 if amd else block_m * line
            if tile > (_TILE // 2 if amd else _TILE) or (amd and block_m > 16 < block_n):
                continue
            if stages_that_fit(target, kept, tile, buffers) == buffers:
                waves = max(1, min(2, target.shared_per_unit // (kept + buffers * tile)))
                lookups = spec.cache == "paged"  # loads that wait for other loads
                ahead = buffers - (block_m == 64)
                stages = ahead * (1 + lookups) + 1
                if block_m == 32 < block_n:  # logits that 4 warps would spill
                    warps = 8
                return cls(block_m, block_n, 0, waves, warps, stages, target.units)
        return None

    @classmethod
    def inputs(cls, spec: LatentSpec, load: Load, device: str = "cpu") -> Inputs:
        made = partial(torch.randn, dtype=load.torch_dtype, device=device)
        queries = (load.batch, spec.heads, load.queries)
        given: Inputs = {"q_latent": made(*queries, spec.rank), "q_rope": made(*queries, spec.rope)}
        shape = (load.batch, load.keys)
        if spec.cache == "paged":
            pages = triton.cdiv(load.keys, spec.page)
            order = torch.randperm(load.batch * pages, device=device).int()
            given["table"] = order.reshape(load.batch, pages)
            shape = (load.batch * pages, spec.page)
        joint = made(*shape, spec.rank + spec.rope)
        return {
            **given, "latents": joint[..., : spec.rank], "k_rope": joint[..., spec.rank :],
            "lengths": torch.full((load.batch,), load.keys, dtype=torch.int32, device=device),
        }  # fmt: skip

    def constants(self, spec: LatentSpec) -> Mapping[str, Any]:
        return {
            "scale": spec.scale, "causal": spec.causal, "block_m": self.block_m,
            "block_n": self.block_n, "splits": self.splits, "units": self.units,
            "waves": self.waves, "warps": self.warps, "stages": self.stages,
            "compiler": self.compiler,
            **precision_argument(self.precision),
        }  # fmt: skip

    @classmethod
    def reference(cls, spec: LatentSpec, inputs: Inputs) -> Outputs:
        return plain.latent_decode(**inputs, scale=spec.scale, causal=spec.causal)[0]

    @classmethod
    def work(cls, spec: LatentSpec, load: Load) -> Work:
        rows = load.batch * spec.heads * load.queries
        wide = 2 * spec.rank + spec.rope
        cache = load.batch * load.keys * (spec.rank + spec.rope)
        return Work(
            2.0 * rows * load.keys * wide, float((cache + rows * wide) * load.torch_dtype.itemsize)
        )

    @classmethod
    def examples(cls) -> tuple[tuple[LatentSpec, Load], ...]:
        def latent(heads: int, page: int = 0) -> LatentSpec:
            sizes = (heads, 512, 64, 128, 128, 192**-0.5, True)
            return LatentSpec(*sizes, "paged" if page else "contiguous", page)

        return (
            (latent(16), Load(8, 1, 32768)),
            (latent(128), Load(8, 1, 32768)),
            (latent(128, 64), Load(8, 2, 32768)),
            (LatentSpec(40, 256, 32, 64, 64, 96**-0.5), Load(8, 1, 32768)),
        )
