"""Exact attention over lists of key blocks (S2-Attention, Lin et al. 2024, algorithm 1; the inner
step is that of FlashAttention-2, Dao 2023).

One program holds a tile of one query block: positions or, where `pack` is more than 1, positions
times query heads that share a key/value head and a pattern, so that small query blocks fill large
tiles. It sweeps the listed blocks twice: those that all its rows read whole, without any mask, then
the partial ones. Programs start in an order of their own, because lists differ in length: where
heads that read everything and heads that read a window run in one launch, the short lists of the
latter fill the processors while the former end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial as bind
from math import gcd
from typing import Any, ClassVar, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.arguments import precision_argument
from attnopt.codegen.block_sparse_spec import BlockSparseSpec, Dense, Scattered, Strided, Windowed
from attnopt.codegen.kernel import CompilerOptions, Inputs, Kernel, Load, Outputs, Work
from attnopt.codegen.kernels.references import block_sparse_prefill as plain
from attnopt.codegen.matrix_units import matrix_units
from attnopt.codegen.pieces.online_softmax import FLOOR, LOG2E, absorb, finish, soft_cap
from attnopt.codegen.pieces.sizes import padded_size
from attnopt.codegen.pieces.tiles import load_tile
from attnopt.codegen.shared_memory import stages_that_fit
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss, choice


@triton.jit
def _sweep_blocks(
    top, total, out, q, k, v, columns, tiles, keys, k_stride, v_stride, b, h, i,
    left, sink, scale, cap, data,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, SPANS: tl.constexpr, CAPPED: tl.constexpr,
    KEEP_HOOK: tl.constexpr, SCORE_HOOK: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr, KEY_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Absorb `tiles` tiles of the key blocks at `columns`; MASKED where rows may not read them
    whole."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    SPLIT: tl.constexpr = KEY_BLOCK // BLOCK_N
    end = keys - 1
    if CAUSAL:
        end = tl.minimum(i, keys - 1)
    for at in tl.range(0, tiles):
        start = tl.load(columns + at // SPLIT) * KEY_BLOCK + at % SPLIT * BLOCK_N
        j = (start + n)[None, :]
        k_tile = load_tile(
            k + tl.cast(start, tl.int64) * k_stride + n[None, :] * k_stride + d[:, None],
            j < keys, (d < D)[:, None], MASKED, D != BLOCK_D,
        )  # fmt: skip
        logits = tl.dot(q, k_tile, input_precision=PRECISION)
        factor = scale * LOG2E
        if CAPPED or SCORE_HOOK is not None:
            logits = logits * scale
            if CAPPED:
                logits = soft_cap(logits, cap)
            if SCORE_HOOK is not None:
                logits = SCORE_HOOK(logits, b, h, i, j, data)
            factor = LOG2E
        if MASKED:
            read = j <= end
            if SPANS:
                near = j > i - left
                if not CAUSAL:
                    near = near & (j < i + left)
                read = read & (near | (j < sink))
            if KEEP_HOOK is not None:
                read = read & KEEP_HOOK(b, h, i, j, data)
            logits = tl.where(read, logits, float("-inf"))
        v_tile = load_tile(
            v + tl.cast(start, tl.int64) * v_stride + n[:, None] * v_stride + e[None, :],
            (start + n < keys)[:, None], (e < V)[None, :], MASKED, V != BLOCK_V,
        )  # fmt: skip
        top, total, out = absorb(top, total, out, logits, factor, v_tile, PRECISION)
    return top, total, out


@triton.jit
def _block_sparse_prefill(
    q, k, v, out, lse,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    out_batch, out_head, out_token, lse_batch, lse_head,
    starts, partial, columns, pattern_of, pattern_batch, order, order_batch, spans,
    queries, keys, offset, rows, scale, cap, data,
    GROUP: tl.constexpr, UNIT: tl.constexpr, PACK: tl.constexpr,
    CAUSAL: tl.constexpr, CAPPED: tl.constexpr, KEEP_HOOK: tl.constexpr, SCORE_HOOK: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = QUERY_BLOCK * PACK // BLOCK_M
    PER_LIST: tl.constexpr = TILES * (UNIT // PACK)  # programs that read the same list in turn
    b = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0) % PER_LIST
    item = tl.program_id(0) // PER_LIST
    if order is not None:
        item = tl.load(order + b * order_batch + item)
    else:  # under a causal mask the last rows are the longest
        item = tl.num_programs(0) // PER_LIST - 1 - item
    unit = item // rows
    block = item % rows
    m = tl.arange(0, BLOCK_M)
    lowest = block * QUERY_BLOCK + part % TILES * (BLOCK_M // PACK)
    if lowest >= queries:
        return
    position = lowest + m // PACK
    head = (unit * UNIT + part // TILES * PACK).to(tl.int64)  # of the first row
    kv_head = head // GROUP

    pattern = tl.load(pattern_of + b * pattern_batch + unit).to(tl.int64)
    at = pattern * (rows + 1) + block
    first = tl.load(starts + at)
    last = tl.load(starts + at + 1)
    middle = tl.load(partial + pattern * rows + block)
    left = 0
    sink = 0
    if spans is not None:
        left = tl.load(spans + pattern * 2)
        sink = tl.load(spans + pattern * 2 + 1)
    SPLIT: tl.constexpr = KEY_BLOCK // BLOCK_N
    partial_tiles = (last - middle) * SPLIT
    if CAUSAL:  # the end of the last block may lie behind the last row of this tile
        ahead = tl.load(columns + last - 1, mask=last > middle, other=0) * KEY_BLOCK + KEY_BLOCK - 1
        ahead -= offset + lowest + BLOCK_M // PACK - 1
        unread = tl.minimum(tl.maximum(ahead, 0) // BLOCK_N, SPLIT)
        partial_tiles -= tl.minimum(unread, partial_tiles)

    i = (offset + position)[:, None]
    h = (head + m % PACK)[:, None]
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    q += b * q_batch + head * q_head + lowest.to(tl.int64) * q_token
    q_at = (m % PACK).to(tl.int64)[:, None] * q_head + (m // PACK)[:, None] * q_token + d[None, :]
    there = position < queries
    q_tile = load_tile(q + q_at, there[:, None], (d < D)[None, :], True, D != BLOCK_D)
    k += b * k_batch + kv_head * k_head
    v += b * v_batch + kv_head * v_head

    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top, total, acc = _sweep_blocks(
        top, total, acc, q_tile, k, v, columns + first, (middle - first) * SPLIT, keys,
        k_token, v_token, b, h, i, left, sink, scale, cap, data,
        False, CAUSAL, spans is not None, CAPPED, KEEP_HOOK, SCORE_HOOK,
        D, V, BLOCK_D, BLOCK_V, BLOCK_N, KEY_BLOCK, PRECISION,
    )  # fmt: skip
    top, total, acc = _sweep_blocks(
        top, total, acc, q_tile, k, v, columns + middle, partial_tiles, keys,
        k_token, v_token, b, h, i, left, sink, scale, cap, data,
        True, CAUSAL, spans is not None, CAPPED, KEEP_HOOK, SCORE_HOOK,
        D, V, BLOCK_D, BLOCK_V, BLOCK_N, KEY_BLOCK, PRECISION,
    )  # fmt: skip

    result, ended = finish(top, total, acc)
    out += b * out_batch + head * out_head + lowest.to(tl.int64) * out_token
    out_at = (m % PACK).to(tl.int64)[:, None] * out_head + (m // PACK)[:, None] * out_token
    tl.store(
        out + out_at + e[None, :], result.to(out.dtype.element_ty),
        mask=there[:, None] & (e < V)[None, :],
    )  # fmt: skip
    if lse is not None:
        lse += b * lse_batch + head * lse_head
        tl.store(lse + (m % PACK) * lse_head + position, ended, mask=there)


def block_sparse_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    partial: Tensor,
    columns: Tensor,
    pattern_of: Tensor,
    spans: Tensor | None = None,
    order: Tensor | None = None,
    offset: int = 0,
    *,
    scale: float,
    causal: bool = True,
    query_block: int,
    key_block: int,
    softcap: float = 0.0,
    keep_hook: Any = None,
    score_hook: Any = None,
    data: Any = None,
    with_lse: bool = False,
    precision: str = "ieee",
    block_m: int = 128,
    block_n: int = 64,
    pack: int = 1,
    warps: int = 4,
    stages: int = 2,
    compiler: tuple[tuple[str, int], ...] = (),
) -> Any:
    """softmax(scale q k^T) v over the keys in the blocks that are listed for each query block.

    q `[batch, heads, S, D]`, k `[batch, kv_heads, T, D]`, v `[batch, kv_heads, T, V]` in fp16, bf16
    or fp32, their last dimension dense; the result is `[batch, heads, S, V]`, in memory
    `[batch, S, heads, V]`, with the log-sum-exps `[batch, heads, S]` in float32 where `with_lse`.
    A query without a key gives zeros and -inf. Query i stands at position `offset` + i; blocks of
    `query_block` (counted from query 0) x `key_block` are powers of two from 16.

    The lists are int32, dense in memory, as `BlockLists` makes them. In pattern p, query block r
    reads the key blocks `columns[starts[p, r] : starts[p, r + 1]]`. From `partial[p, r]` on they
    are read in part: keys below T, with j <= i where `causal`, with i - j < left or j < sink where
    `spans` holds [left, sink] of each pattern, and where `keep_hook` allows; those before it must
    be whole blocks of T. `pattern_of` `[units]` or `[batch, units]` names the pattern of each
    key/value head, or of each query head. `order` `[units * rows]` or `[batch, units * rows]` holds
    unit * rows + row in the order of launch.

    Hooks as in `flash_prefill`; `score_hook(logits, batch, head, i, j, data)` sees all blocks.
    `block_m`, `block_n` and `pack` are lowered to what the blocks and heads allow; `compiler` are
    further options of Triton's compiler. Raises `ValueError` where the shapes of the lists disagree
    with the inputs.
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, queries, depth = q.shape
    kv_heads, keys, width = k.shape[1], k.shape[2], v.shape[3]
    units, rows = pattern_of.shape[-1], triton.cdiv(queries, query_block)
    if units not in (heads, kv_heads) or partial.shape[1] != rows or starts.shape[1] != rows + 1:
        raise ValueError(
            f"lists of {partial.shape[1]} query blocks for {units} units, but {queries} queries in "
            f"blocks of {query_block} are {rows}, and there are {heads} heads, {kv_heads} shared"
        )
    if order is not None and order.shape[-1] != units * rows:
        raise ValueError(f"an order of {order.shape[-1]} lists, but there are {units * rows}")
    pack = gcd(pack, heads // units)
    block_m, block_n = min(block_m, query_block * pack), min(block_n, key_block)
    tokens = torch.empty(batch, queries, heads, width, dtype=q.dtype, device=q.device)
    out = tokens.transpose(1, 2)
    lse = None
    if with_lse:
        lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    grid = (units * rows * (query_block * (heads // units) // block_m), batch)
    _block_sparse_prefill[grid](
        q, k, v, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *((0, 0) if lse is None else lse.stride()[:2]),
        starts, partial, columns, pattern_of, pattern_of.expand(batch, units).stride(0),
        order, 0 if order is None else order.expand(batch, units * rows).stride(0), spans,
        queries, keys, offset, rows, scale, softcap, data,
        GROUP=heads // kv_heads, UNIT=heads // units, PACK=pack, CAUSAL=causal,
        CAPPED=softcap > 0, KEEP_HOOK=keep_hook, SCORE_HOOK=score_hook,
        D=depth, V=width, BLOCK_D=padded_size(depth), BLOCK_V=padded_size(width),
        QUERY_BLOCK=query_block, KEY_BLOCK=key_block, BLOCK_M=block_m, BLOCK_N=block_n,
        PRECISION=precision, num_warps=warps, num_stages=stages, **dict(compiler),
    )  # fmt: skip
    return (out, lse) if with_lse else out


@dataclass(frozen=True)
class BlockSparsePrefill(CompilerOptions, Kernel[BlockSparseSpec]):
    """`block_sparse_prefill` with its tile sizes."""

    name: ClassVar[str] = "block_sparse_prefill"
    source: ClassVar[str] = "S2-Attention (Lin et al. 2024)"
    launcher = staticmethod(block_sparse_prefill)

    block_m: int = choice(16, 32, 64, 128, 256, default=128)
    block_n: int = choice(16, 32, 64, 128, default=64)
    pack: int = choice(1, 2, 4, 8, default=1)
    warps: int = choice(1, 2, 4, 8, default=4)
    stages: int = choice(1, 2, 3, 4, default=2)
    precision: str = "ieee"  # of products of float32, see `precision_argument`

    @classmethod
    def supports(cls, spec: BlockSparseSpec, target: Target) -> Miss | None:
        if max(spec.head_dim, spec.v_dim) > 256:
            return Miss(f"head_dim {max(spec.head_dim, spec.v_dim)} is more than 256")
        if spec.scale <= 0:
            return Miss(f"the softmax scale {spec.scale} is not positive")
        return None

    @classmethod
    def default(cls, spec: BlockSparseSpec, target: Target, load: Load) -> Self:
        wide = padded_size(spec.head_dim) + padded_size(spec.v_dim)
        item = load.torch_dtype.itemsize
        pack = 1
        while not spec.per_head and spec.group % (2 * pack) == 0 and spec.query_block * pack < 128:
            pack *= 2
        most = min(128, spec.query_block * pack)
        if item == 4 or not matrix_units(target, load.dtype):  # products of one number at a time
            return cls(min(32, most), 16, pack, 4, 2)
        # Where products take their first operand from registers, large tiles do not fit there.
        from_shared = target.capability in ("9.0", "10.0")
        in_shared = from_shared or target.vendor == "amd"
        if not in_shared and wide > 256:
            most = min(64, most)
        tight = not in_shared and most < 128 and wide > 128
        block_n = min(32 if wide > 256 or tight else 64, spec.key_block)
        for block_m in (most, min(64, most)):
            kept = block_m * padded_size(spec.head_dim) * item if from_shared else 0
            stages = stages_that_fit(target, kept, block_n * wide * item, 2 if tight else 3)
            if stages:
                eight = block_m * wide >= (128 * 128 if target.vendor == "nvidia" else 128 * 256)
                eight = eight and (block_m == 128 or wide > 256)
                return cls(block_m, block_n, pack, 8 if eight else 4, stages)
        return cls(16, 16, pack, 4, 1)

    @classmethod
    def inputs(cls, spec: BlockSparseSpec, load: Load, device: str = "cpu") -> Inputs:
        made = bind(torch.randn, dtype=load.torch_dtype, device=device)
        lists = spec.lists(load.queries, load.keys, load.torch_dtype.itemsize).to(device)
        return {
            "q": made(load.batch, spec.heads, load.queries, spec.head_dim),
            "k": made(load.batch, spec.kv_heads, load.keys, spec.head_dim),
            "v": made(load.batch, spec.kv_heads, load.keys, spec.v_dim),
            **lists.inputs(), "offset": load.keys - load.queries,
        }  # fmt: skip

    def constants(self, spec: BlockSparseSpec) -> Mapping[str, Any]:
        return {
            **computed(spec), "with_lse": spec.lse, "block_m": self.block_m,
            "block_n": self.block_n, "pack": self.pack, "warps": self.warps, "stages": self.stages,
            "compiler": self.compiler,
            **precision_argument(self.precision),
        }  # fmt: skip

    @classmethod
    def reference(cls, spec: BlockSparseSpec, inputs: Inputs) -> Outputs:
        out, lse = plain.block_sparse_prefill(**inputs, **computed(spec))
        return (out, lse) if spec.lse else out

    @classmethod
    def work(cls, spec: BlockSparseSpec, load: Load) -> Work:
        lists = spec.lists(load.queries, load.keys, load.torch_dtype.itemsize)
        scores = int(lists.scores[lists.pattern_of.long()].sum()) * (spec.heads // spec.units)
        wide = spec.head_dim + spec.v_dim
        tokens = load.batch * (load.queries * spec.heads + load.keys * spec.kv_heads)
        listed = sum(x.nbytes for x in lists.inputs().values() if x is not None)
        flops = 2.0 * load.batch * scores * wide
        return Work(flops, float(tokens * wide * load.torch_dtype.itemsize + listed))

    @classmethod
    def examples(cls) -> tuple[tuple[BlockSparseSpec, Load], ...]:
        load = Load(1, 32768, 32768)
        made = [
            (BlockSparseSpec(32, 8, d, d, d**-0.5, Windowed(1024, 64)), load) for d in (64, 128)
        ]
        for d in (64, 128):
            video = BlockSparseSpec(
                12, 12, d, d, d**-0.5, Scattered(0.05, 4), causal=False, query_block=64
            )
            made.append((video, load))
        for pattern, size in (
            (Strided(16, 16), Load(1, 131072, 131072)),
            (Windowed(256, 64, full=8), Load(1, 102400, 102400)),
            (Dense(), Load(1, 16384, 16384)),
        ):
            made.append((BlockSparseSpec(32, 32, 128, 128, 128**-0.5, pattern), size))
        return tuple(made)


def computed(spec: BlockSparseSpec) -> dict[str, Any]:
    """The launcher's arguments that say what is computed."""
    return {
        "scale": spec.scale, "causal": spec.causal, "query_block": spec.query_block,
        "key_block": spec.key_block, "softcap": spec.softcap,
    }  # fmt: skip
