"""Exact attention of many queries (FlashAttention-2, Dao 2023, algorithm 1).

One program holds a tile of queries of one key/value head: BLOCK_M rows, which are positions or,
`packed`, positions times the query heads that share the head, so that short prompts of grouped
models fill their tiles. It runs through the keys that some row can read in two loops: tiles that
every row reads whole, where no mask is computed, and the others (sink tokens, the left edge of the
window, the diagonal, the end). Rows of the largest index are launched first, because under a causal
mask they take longest.
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

from attnopt.codegen.arguments import mask_arguments, precision_argument
from attnopt.codegen.kernel import CompilerOptions, Inputs, Kernel, Load, Outputs, Work
from attnopt.codegen.kernels.references import flash_prefill as plain
from attnopt.codegen.matrix_units import matrix_units
from attnopt.codegen.pieces.attend import attend, mean_values
from attnopt.codegen.pieces.online_softmax import FLOOR, LOG2E, NEVER, finish
from attnopt.codegen.pieces.reach import extent, key_tiles
from attnopt.codegen.pieces.rows import by_token, dense_rows
from attnopt.codegen.pieces.sizes import ceil_div, padded_size, with_strides
from attnopt.codegen.pieces.tiles import load_tile
from attnopt.codegen.shared_memory import loop_stages
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss, choice
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask


@triton.jit
def _prefill_tile(
    program, tensors, strides, sizes, edits, reach,
    MASK: tl.constexpr, EDITS: tl.constexpr, MEAN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of queries: number `program` of a row of them, longest first, in them heads, in them
    sequences. Bundles as `_flash_prefill` makes them."""
    HEADS: tl.constexpr = TILE[0]
    GROUP: tl.constexpr = TILE[1]
    PACK: tl.constexpr = TILE[2]
    D: tl.constexpr = TILE[3]
    V: tl.constexpr = TILE[4]
    BLOCK_D: tl.constexpr = TILE[5]
    BLOCK_V: tl.constexpr = TILE[6]
    BLOCK_M: tl.constexpr = TILE[7]
    BLOCK_N: tl.constexpr = TILE[8]
    PRECISION: tl.constexpr = TILE[9]
    q, k, v, out, lse = tensors
    (
        q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
        out_batch, out_head, out_token, lse_batch, lse_head,
    ) = strides  # fmt: skip
    q_starts, k_starts, queries, keys, offset, tiles = sizes
    bias, keep, padding, sinks, scale, cap, data = edits
    block = tiles - 1 - program % tiles
    heads = program // tiles % (HEADS // PACK) * PACK
    b = (program // tiles // (HEADS // PACK)).to(tl.int64)
    base, first_query, queries, first_key, keys, offset = extent(
        b, q_starts, k_starts, queries, keys, offset
    )
    keys = tl.where(block * BLOCK_M < queries * PACK, keys, 0)  # a short sequence has no such tile
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    position = row // PACK
    h = (heads + row % PACK).to(tl.int64)[:, None]  # all of one key/value head
    token = first_query + position.to(tl.int64)[:, None]
    i = (offset + position)[:, None]
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    there = (position < queries)[:, None]
    q_at = q + base * q_batch + h * q_head + token * q_token
    q_tile = load_tile(q_at + d[None, :], there, (d < D)[None, :], True, D != BLOCK_D)
    k += base * k_batch + (heads // GROUP).to(tl.int64) * k_head + first_key * k_token
    v += base * v_batch + (heads // GROUP).to(tl.int64) * v_head + first_key * v_token

    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:  # one more logit per row, of no key
        at = sinks[0] + b * sinks[1] + h * sinks[2] + token * sinks[3]
        logit = tl.load(at, mask=there, other=float("-inf")).to(tl.float32) * LOG2E
        top = tl.maximum(top, tl.reshape(logit, [BLOCK_M]))
        total = tl.where(tl.reshape(logit, [BLOCK_M]) > FLOOR, 1.0, total)
    state = (top, total, tl.zeros([BLOCK_M, BLOCK_V], tl.float32))

    lowest = offset + block * BLOCK_M // PACK
    highest = offset + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // PACK, queries - 1)
    # Tiles of keys [0, sinking) and [first, last) are read; of them [inner, whole) by every row.
    sinking, first, inner, whole, last = key_tiles(
        lowest, highest, keys, reach[0], reach[1], MASK[0], MASK[1], MASK[2], BLOCK_N
    )
    source = (k, v, k_token, v_token, keys)
    rows = (b, h, i, position[:, None], queries)
    changes = (bias, keep, padding, scale, cap, data)
    SHAPE: tl.constexpr = (D, V, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION)
    for tile in tl.range(inner, whole):
        state = attend(
            state, q_tile, tile * BLOCK_N, source, rows, changes, reach, MASK, EDITS, SHAPE, False
        )
    # The rest in one loop, sink tokens, then the window's left edge, then the end, because every
    # further copy of the body costs registers.
    for step in tl.range(0, sinking + (inner - first) + (last - whole)):
        tile = step
        if MASK[1]:  # a window
            tile = tl.where(step < sinking, step, step - sinking + first)
        tile = tl.where(tile < inner, tile, tile - inner + whole)
        state = attend(
            state, q_tile, tile * BLOCK_N, source, rows, changes, reach, MASK, EDITS, SHAPE, True
        )

    top, total, acc = state
    result, ended = finish(top, total, acc)
    if MEAN:
        empty = (top < NEVER) & (position < queries)
        if tl.max(empty.to(tl.int32), 0) > 0:
            mean = mean_values(v, keys, v_token, V, BLOCK_V, BLOCK_N)
            result = tl.where(empty[:, None], mean, result)
    out_at = out + base * out_batch + h * out_head + token * out_token + e[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=there & (e < V)[None, :])
    if lse is not None:
        lse_at = lse + base * lse_batch + h * lse_head + token
        tl.store(lse_at, ended[:, None], mask=there)


@triton.jit(do_not_specialize=["queries", "keys", "offset", "left", "sink", "tiles", "programs"])
def _flash_prefill(
    q, k, v, out, lse,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    out_batch, out_head, out_token, lse_batch, lse_head,
    q_starts, k_starts, queries, keys, offset, tiles, programs,
    bias, keep, padding, sinks, scale, cap, left, sink, data,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, CAPPED: tl.constexpr,
    MEAN: tl.constexpr, KEEP_HOOK: tl.constexpr, SCORE_HOOK: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tensors = (q, k, v, out, lse)
    strides = (
        q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
        out_batch, out_head, out_token, lse_batch, lse_head,
    )  # fmt: skip
    sizes = (q_starts, k_starts, queries, keys, offset, tiles)
    edits = (bias, keep, padding, sinks, scale, cap, data)
    reach = (left, sink)
    MASK: tl.constexpr = (CAUSAL, WINDOW, SINK)
    EDITS: tl.constexpr = (CAPPED, SCORE_HOOK, KEEP_HOOK)
    TILE: tl.constexpr = (
        HEADS, GROUP, PACK, D, V, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    # One axis, because the others end at 65535.
    if PERSISTENT:
        for program in tl.range(tl.program_id(0), programs, tl.num_programs(0), num_stages=1):
            _prefill_tile(program, tensors, strides, sizes, edits, reach, MASK, EDITS, MEAN, TILE)
    else:
        program = tl.program_id(0)
        _prefill_tile(program, tensors, strides, sizes, edits, reach, MASK, EDITS, MEAN, TILE)


def flash_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    padding: Tensor | None = None,
    sinks: Tensor | None = None,
    q_starts: Tensor | None = None,
    k_starts: Tensor | None = None,
    longest: int = 0,
    offset: int = 0,
    *,
    scale: float,
    causal: bool = True,
    window: bool = False,
    left: int = 0,
    sink: int = 0,
    softcap: float = 0.0,
    mean_of_none: bool = False,
    keep_hook: Any = None,
    score_hook: Any = None,
    data: Any = None,
    with_lse: bool = False,
    precision: str = "ieee",
    block_m: int = 128,
    block_n: int = 64,
    packed: bool = False,
    waves: int = 0,
    units: int = 132,
    warps: int = 4,
    stages: int = 2,
    compiler: tuple[tuple[str, int], ...] = (),
) -> Any:
    """softmax(scale q k^T + bias) v over the keys that each query may read.

    q `[batch, heads, S, D]`, k `[batch, kv_heads, T, D]`, v `[batch, kv_heads, T, V]` in fp16, bf16
    or fp32, their last dimension dense; the result is `[batch, heads, S, V]`, in memory
    `[batch, S, heads, V]`, with the log-sum-exps `[batch, heads, S]` in float32 where `with_lse`.
    Query i stands at position `offset` + i and reads key j <= i where `causal`, i - j < `left` or
    j < `sink` where `window`. `bias` is added to the logits, `keep` (bool) drops keys, both
    broadcast to [batch, heads, S, T]; `padding` [batch, T] is true at real keys; `sinks` broadcasts
    to [batch, heads, S, 1]. A query without a key gives zeros, or the mean of all values.

    Sequences of various lengths: q `[1, heads, all of S, D]` and so on, `q_starts` and `k_starts`
    int32 `[sequences + 1]`, and `longest` the most queries of one; the last queries then stand at
    the last keys, and rows beyond the last sequence have no key.

    Hooks are `@triton.jit` functions of scalars and broadcasting tiles:
    `keep_hook(batch, head, i, j, data)` and `score_hook(logits, batch, head, i, j, data)`, with
    `data` a tuple of tensors and numbers.

    With `waves`, no more than so many programs for each of `units` processors are launched, which
    turn to one tile of queries after another. `compiler` are further options of Triton's compiler.
    """
    varied = q_starts is not None
    batch, heads, tokens, depth = q.shape
    kv_heads, keys, width = v.shape[1:]
    if k.shape != (batch, kv_heads, keys, depth) or v.shape[0] != batch:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not match")
    given = (q, k, v, bias, sinks)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        raise ValueError("a launch gives no gradients: see flash_prefill_backward")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads")
    if varied and not (bias is None and keep is None and padding is None):
        raise ValueError("bias, keep and padding have no meaning for sequences of various lengths")
    if varied and sinks is not None and sinks.numel() not in (1, heads):
        raise ValueError("with sequences of various lengths, sinks are one number per head")
    (q, q_strides), (k, k_strides), (v, v_strides) = dense_rows(q), dense_rows(k), dense_rows(v)
    sequences, queries = batch, tokens
    out, lse = by_token(q, batch, heads, tokens, width), None
    if with_lse:
        lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if q_starts is not None:
        q_starts = q_starts.contiguous()
        k_starts = None if k_starts is None else k_starts.contiguous()
        sequences, queries = q_starts.shape[0] - 1, longest
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
    shape = (sequences, heads, tokens, keys)
    group = heads // kv_heads
    pack = group if packed else 1
    tiles = ceil_div(queries * pack, block_m)
    programs = tiles * (heads // pack) * sequences
    _flash_prefill[(min(programs, waves * units) if waves else programs,)](
        q, k, v, out, lse,
        *q_strides, *k_strides, *v_strides, *out.stride()[:3],
        *((0, 0) if lse is None else lse.stride()[:2]),
        q_starts, k_starts, tokens, keys, offset, tiles, programs,
        with_strides(bias, *shape), with_strides(keep, *shape),
        with_strides(padding, sequences, keys), with_strides(sinks, *shape[:3], 1),
        scale, softcap, left, sink, data,
        HEADS=heads, GROUP=group, PACK=pack, CAUSAL=causal, WINDOW=window, SINK=sink > 0,
        CAPPED=softcap > 0, MEAN=mean_of_none, KEEP_HOOK=keep_hook, SCORE_HOOK=score_hook,
        D=depth, V=width, BLOCK_D=padded_size(depth), BLOCK_V=padded_size(width),
        BLOCK_M=block_m, BLOCK_N=block_n, PERSISTENT=waves > 0, PRECISION=precision,
        num_warps=warps, num_stages=stages, **dict(compiler),
    )  # fmt: skip
    return (out, lse) if with_lse else out


@dataclass(frozen=True)
class FlashPrefill(CompilerOptions, Kernel[AttentionSpec]):
    """`flash_prefill` with its tile sizes. `units` are the target's, `default` sets them."""

    name: ClassVar[str] = "flash_prefill"
    source: ClassVar[str] = "FlashAttention-2 (Dao 2023)"
    launcher = staticmethod(flash_prefill)

    block_m: int = choice(16, 32, 64, 128, 256, default=128)
    block_n: int = choice(16, 32, 64, 128, default=64)
    packed: bool = choice(False, True, default=False)
    warps: int = choice(1, 2, 4, 8, default=4)
    stages: int = choice(1, 2, 3, 4, default=2)
    waves: int = choice(0, 1, 2, default=0)
    units: int = 132
    precision: str = "ieee"  # of products of float32, see `precision_argument`

    @classmethod
    def supports(cls, spec: AttentionSpec, target: Target) -> Miss | None:
        if target.measured:
            return Miss(f"Triton has no code for {target.title}")
        return unsupported(spec)

    @classmethod
    def default(cls, spec: AttentionSpec, target: Target, load: Load) -> Self:
        wide = padded_size(spec.head_dim) + padded_size(spec.v_dim)
        item = load.torch_dtype.itemsize
        group = spec.group if spec.group & (spec.group - 1) == 0 else 1
        packed = group > 1 and load.queries * group <= 128
        warps = 4 if wide <= 128 else 8
        if matrix_units(target, load.dtype):
            # Larger tiles of logits are spilled where another tensor is loaded for each, and where
            # queries and weights are held in registers by 4 warps.
            held = warps == 4 and target.architecture in ("ampere", "ada")
            block_m = 128 if wide <= 256 else 64
            block_n = 32 if held or {"bias", "keep", "padding"} & {*spec.extras} else 64
        else:  # every thread keeps its rows and columns in registers
            block_m, block_n = 32, (32 if wide <= 128 else 16)
            warps = 4 if wide <= 256 else 8
        rows = triton.next_power_of_2(load.queries * (group if packed else 1))
        block_m = min(block_m, max(16, rows))
        kept = block_m * padded_size(spec.head_dim) * item
        while block_n > 16 and not loop_stages(target, kept, block_n * wide * item):
            block_n //= 2
        stages = max(1, loop_stages(target, kept, block_n * wide * item))
        return cls(block_m, block_n, packed, warps, stages, units=target.units)

    @classmethod
    def inputs(cls, spec: AttentionSpec, load: Load, device: str = "cpu") -> Inputs:
        made = partial(torch.randn, dtype=load.torch_dtype, device=device)
        queries, keys = (load.batch, spec.heads, load.queries), (load.batch, 1, 1, load.keys)
        given = {
            "q": made(*queries, spec.head_dim),
            "k": made(load.batch, spec.kv_heads, load.keys, spec.head_dim),
            "v": made(load.batch, spec.kv_heads, load.keys, spec.v_dim),
        }
        extras = {
            "bias": lambda: made(1, spec.heads, load.queries, load.keys),
            "keep": lambda: torch.rand(load.batch, 1, load.queries, load.keys, device=device) < 0.8,
            "padding": lambda: torch.rand(keys, device=device)[:, 0, 0] < 0.8,
            "sinks": lambda: made(1, spec.heads, 1, 1),
        }
        return {**given, **{name: extras[name]() for name in spec.extras}}

    def constants(self, spec: AttentionSpec) -> Mapping[str, Any]:
        return {
            **mask_arguments(spec.mask), "scale": spec.scale, "softcap": spec.softcap,
            "mean_of_none": spec.fill == "min", "block_m": self.block_m, "block_n": self.block_n,
            "packed": self.packed, "waves": self.waves, "units": self.units, "warps": self.warps,
            "stages": self.stages, "compiler": self.compiler,
            **precision_argument(self.precision),
        }  # fmt: skip

    @classmethod
    def reference(cls, spec: AttentionSpec, inputs: Inputs) -> Outputs:
        return plain.flash_prefill(
            **inputs, **mask_arguments(spec.mask), scale=spec.scale, softcap=spec.softcap,
            mean_of_none=spec.fill == "min",
        )[0]  # fmt: skip

    @classmethod
    def work(cls, spec: AttentionSpec, load: Load) -> Work:
        pairs, item = spec.mask.pairs(load.queries, load.keys), load.torch_dtype.itemsize
        wide = spec.head_dim + spec.v_dim
        tokens = load.batch * (load.queries * spec.heads + load.keys * spec.kv_heads)
        extras = {  # of the sizes that `inputs` gives them
            "bias": pairs * spec.heads * item, "keep": pairs * load.batch,
            "padding": load.batch * load.keys, "sinks": spec.heads * item,
        }  # fmt: skip
        moved = tokens * wide * item + sum(extras[name] for name in spec.extras)
        return Work(2.0 * load.batch * spec.heads * pairs * wide, float(moved))

    def waste(self, spec: AttentionSpec, load: Load) -> float:
        pack = spec.group if self.packed else 1
        mask, done = spec.mask, 0
        for first in range(0, load.queries * pack, self.block_m):
            low = first // pack
            high = min(load.queries, (first + self.block_m - 1) // pack + 1)
            begin, end = 0, load.keys
            if mask.kind == "window":
                begin, end = max(0, low - mask.left + 1), min(end, high + mask.left)
            if mask_arguments(mask)["causal"]:
                end = min(end, high)
            tiles = triton.cdiv(end, self.block_n) - begin // self.block_n
            done += max(0, tiles) * self.block_n * self.block_m
        least = self.work(spec, load).flops / (2.0 * (spec.head_dim + spec.v_dim))
        return max(1.0, load.batch * spec.heads / pack * done / least)

    @classmethod
    def examples(cls) -> tuple[tuple[AttentionSpec, Load], ...]:
        load = Load(1, 8192, 8192)
        return tuple(
            (AttentionSpec(32, 8, depth, depth, depth**-0.5, mask), load)
            for depth in (64, 128)
            for mask in (CAUSAL, Mask("window", left=1024, sink=4))
        )


def unsupported(spec: AttentionSpec) -> Miss | None:
    """Why no kernel of exact attention computes the spec, None where one may."""
    if max(spec.head_dim, spec.v_dim) > 256:
        return Miss(f"head_dim {max(spec.head_dim, spec.v_dim)} is more than 256")
    if spec.scale <= 0:
        return Miss(f"the softmax scale {spec.scale} is not positive")
    if len(set(spec.extras)) < len(spec.extras):
        return Miss(f"an extra is given twice: {', '.join(spec.extras)}")
    return None
