"""Latent attention (MLA) of many queries, in expanded form: exact attention whose keys are a part
of each head's own and a rotary part that all heads share (DeepSeek-V2, section 2.1; tiles as in
FlashAttention-2, Dao 2023).

The logits are the sum of two products, so the shared part is read as it is and never written out
for each head. Values may have another width than keys.
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

from attnopt.codegen.arguments import precision_argument
from attnopt.codegen.kernel import CompilerOptions, Inputs, Kernel, Load, Outputs, Work
from attnopt.codegen.kernels.references import latent_prefill as plain
from attnopt.codegen.latent_spec import LatentSpec
from attnopt.codegen.matrix_units import matrix_units
from attnopt.codegen.pieces.masks import within
from attnopt.codegen.pieces.online_softmax import FLOOR, LOG2E, absorb, finish
from attnopt.codegen.pieces.sizes import ceil_div, padded_size, with_strides
from attnopt.codegen.pieces.tiles import load_tile
from attnopt.codegen.shared_memory import stages_that_fit
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss, choice

_LARGE = 200_000  # bytes of shared memory where products of 64 rows run beside everything else


@triton.jit
def _sweep(
    top, total, out, q, q_rope, k, k_rope, v, first, last, keys, k_token, r_token, v_token,
    b, i, padding, scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Absorb the keys [first, last), `first` a multiple of the tile; MASKED where a row of the tile
    may not read them all."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    p = tl.arange(0, BLOCK_P)
    e = tl.arange(0, BLOCK_V)
    for start in tl.range(first, last, BLOCK_N):
        j = start + n
        begin = tl.cast(start, tl.int64)
        k_tile = load_tile(
            k + begin * k_token + n[None, :] * k_token + d[:, None],
            (j < keys)[None, :], (d < D)[:, None], MASKED, D != BLOCK_D,
        )  # fmt: skip
        logits = tl.dot(q, k_tile, input_precision=PRECISION)
        r_tile = load_tile(
            k_rope + begin * r_token + n[None, :] * r_token + p[:, None],
            (j < keys)[None, :], (p < P)[:, None], MASKED, P != BLOCK_P,
        )  # fmt: skip
        logits = tl.dot(q_rope, r_tile, logits, input_precision=PRECISION)
        if padding is not None:
            real = tl.load(padding[0] + b * padding[1] + j * padding[2], mask=j < keys, other=0)
            logits = tl.where((real != 0)[None, :], logits, float("-inf"))
        if MASKED:
            read = within(i, j[None, :], keys, 0, 0, CAUSAL, False, False)
            logits = tl.where(read, logits, float("-inf"))
        v_tile = load_tile(
            v + begin * v_token + n[:, None] * v_token + e[None, :],
            (j < keys)[:, None], (e < V)[None, :], MASKED, V != BLOCK_V,
        )  # fmt: skip
        top, total, out = absorb(top, total, out, logits, scale * LOG2E, v_tile, PRECISION)
    return top, total, out


@triton.jit
def _latent_prefill(
    q, k, k_rope, v, out, lse,
    q_batch, q_head, q_token, k_batch, k_head, k_token, r_batch, r_token,
    v_batch, v_head, v_token, out_batch, out_head, out_token, lse_batch, lse_head,
    queries, keys, offset, padding, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, P: tl.constexpr, V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = (offset + row)[:, None]
    d = tl.arange(0, BLOCK_D)
    p = tl.arange(0, BLOCK_P)
    e = tl.arange(0, BLOCK_V)
    there = (row < queries)[:, None]
    q_at = q + b * q_batch + h * q_head + row.to(tl.int64)[:, None] * q_token
    q_tile = load_tile(q_at + d[None, :], there, (d < D)[None, :], True, D != BLOCK_D)
    turned = load_tile(q_at + D + p[None, :], there, (p < P)[None, :], True, P != BLOCK_P)
    k += b * k_batch + h * k_head
    k_rope += b * r_batch
    v += b * v_batch + h * v_head

    top = tl.full([BLOCK_M], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    end = keys
    whole = keys  # keys that every row may read
    if CAUSAL:
        highest = offset + tl.minimum(block * BLOCK_M + BLOCK_M, queries) - 1
        end = tl.minimum(keys, highest + 1)
        whole = tl.minimum(keys, offset + block * BLOCK_M + 1)
    whole = tl.maximum(whole, 0) // BLOCK_N * BLOCK_N
    top, total, acc = _sweep(
        top, total, acc, q_tile, turned, k, k_rope, v, 0, whole, keys, k_token, r_token, v_token,
        b, i, padding, scale, False, CAUSAL, D, P, V, BLOCK_D, BLOCK_P, BLOCK_V, BLOCK_N, PRECISION,
    )  # fmt: skip
    top, total, acc = _sweep(
        top, total, acc, q_tile, turned, k, k_rope, v, whole, end, keys, k_token, r_token, v_token,
        b, i, padding, scale, True, CAUSAL, D, P, V, BLOCK_D, BLOCK_P, BLOCK_V, BLOCK_N, PRECISION,
    )  # fmt: skip

    result, ended = finish(top, total, acc)
    out_at = out + b * out_batch + h * out_head + row.to(tl.int64)[:, None] * out_token
    tl.store(out_at + e[None, :], result.to(out.dtype.element_ty), mask=there & (e < V)[None, :])
    if lse is not None:
        tl.store(lse + b * lse_batch + h * lse_head + row, ended, mask=row < queries)


def latent_prefill(
    q: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    padding: Tensor | None = None,
    offset: int = 0,
    *,
    scale: float,
    causal: bool = True,
    with_lse: bool = False,
    precision: str = "ieee",
    block_m: int = 128,
    block_n: int = 64,
    warps: int = 8,
    stages: int = 3,
    compiler: tuple[tuple[str, int], ...] = (),
) -> Any:
    """softmax(scale q [k_nope, k_rope]^T) v, with k_rope shared by all heads.

    q `[batch, heads, S, D + rope]`, its rotary part last; k_nope `[batch, heads, T, D]`, k_rope
    `[batch, 1, T, rope]`, v `[batch, heads, T, V]` in fp16, bf16 or fp32, their last dimension
    dense; k_nope and v may be slices of one tensor. The result is `[batch, heads, S, V]`, in memory
    `[batch, S, heads, V]`, with the log-sum-exps `[batch, heads, S]` in float32 where `with_lse`.
    Query i stands at position `offset` + i and reads key j <= i where `causal`; `padding` bool
    [batch, T] is true at real keys. A query without a key gives zeros. `compiler` are further
    options of Triton's compiler.
    """
    q, k_nope, k_rope, v = (
        x if x.stride(3) == 1 else x.contiguous() for x in (q, k_nope, k_rope, v)
    )
    batch, heads, queries = q.shape[:3]
    depth, rope, width, keys = k_nope.shape[3], k_rope.shape[3], v.shape[3], v.shape[2]
    out = torch.empty(batch, queries, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = None
    if with_lse:
        lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    _latent_prefill[(ceil_div(queries, block_m), heads, batch)](
        q, k_nope, k_rope, v, out, lse, *q.stride()[:3], *k_nope.stride()[:3],
        k_rope.stride(0), k_rope.stride(2), *v.stride()[:3], *out.stride()[:3],
        *((0, 0) if lse is None else lse.stride()[:2]), queries, keys, offset,
        with_strides(padding, batch, keys), scale,
        CAUSAL=causal, D=depth, P=rope, V=width, BLOCK_D=padded_size(depth),
        BLOCK_P=padded_size(rope), BLOCK_V=padded_size(width), BLOCK_M=block_m, BLOCK_N=block_n,
        PRECISION=precision, num_warps=warps, num_stages=stages, **dict(compiler),
    )  # fmt: skip
    return (out, lse) if with_lse else out


@dataclass(frozen=True)
class LatentPrefill(CompilerOptions, Kernel[LatentSpec]):
    """`latent_prefill` with its tile sizes."""

    name: ClassVar[str] = "latent_prefill"
    source: ClassVar[str] = "DeepSeek-V2 (2024), section 2.1; FlashAttention-2 (Dao 2023)"
    launcher = staticmethod(latent_prefill)

    block_m: int = choice(16, 32, 64, 128, default=128)
    block_n: int = choice(16, 32, 64, 128, default=64)
    warps: int = choice(4, 8, default=8)
    stages: int = choice(1, 2, 3, 4, default=3)
    precision: str = "ieee"  # of products of float32, see `precision_argument`

    @classmethod
    def supports(cls, spec: LatentSpec, target: Target) -> Miss | None:
        if max(spec.head_dim, spec.v_dim) > 256:
            return Miss(f"head_dim {max(spec.head_dim, spec.v_dim)} is more than 256")
        if spec.scale <= 0:
            return Miss(f"the softmax scale {spec.scale} is not positive")
        return None

    @classmethod
    def default(cls, spec: LatentSpec, target: Target, load: Load) -> Self:
        item, amd = load.torch_dtype.itemsize, target.vendor == "amd"
        deep = padded_size(spec.head_dim) + padded_size(spec.rope)
        key = (deep + padded_size(spec.v_dim)) * item
        async_products = target.shared_per_block >= _LARGE and item == 2
        buffers = 1 if amd else 3 if async_products else 2
        most = min(128, max(16, triton.next_power_of_2(load.queries)))
        if not matrix_units(target, load.dtype):  # every thread keeps its rows and columns
            return cls(min(32 if key <= 320 * item else 16, most), 16, 4, 2)
        for block_m in (128, 64, 32, 16):
            for block_n in (64, 32, 16):
                tile, kept = block_n * key, 0 if amd else block_m * deep * item
                if block_m > most or tile > (40960 if async_products else 24576):
                    continue
                if stages_that_fit(target, kept, tile, buffers) == buffers:
                    stages = buffers if async_products else buffers + 1
                    return cls(block_m, block_n, 8 if block_m == 128 else 4, stages)
        return cls(16, 16, 4, 1)

    @classmethod
    def inputs(cls, spec: LatentSpec, load: Load, device: str = "cpu") -> Inputs:
        made = partial(torch.randn, dtype=load.torch_dtype, device=device)
        queries, keys = (load.batch, spec.heads, load.queries), (load.batch, spec.heads, load.keys)
        return {
            "q": made(*queries, spec.head_dim + spec.rope),
            "k_nope": made(*keys, spec.head_dim),
            "k_rope": made(load.batch, 1, load.keys, spec.rope),
            "v": made(*keys, spec.v_dim),
        }

    def constants(self, spec: LatentSpec) -> Mapping[str, Any]:
        return {
            "scale": spec.scale, "causal": spec.causal, "block_m": self.block_m,
            "block_n": self.block_n, "warps": self.warps, "stages": self.stages,
            "compiler": self.compiler,
            **precision_argument(self.precision),
        }  # fmt: skip

    @classmethod
    def reference(cls, spec: LatentSpec, inputs: Inputs) -> Outputs:
        return plain.latent_prefill(**inputs, scale=spec.scale, causal=spec.causal)[0]

    @classmethod
    def work(cls, spec: LatentSpec, load: Load) -> Work:
        scores = load.batch * spec.heads * load.queries * load.keys
        if spec.causal and load.queries == load.keys:
            scores = load.batch * spec.heads * load.keys * (load.keys + 1) // 2
        deep = spec.head_dim + spec.rope
        ends = load.queries * spec.heads * (deep + spec.v_dim)
        read = load.keys * (spec.heads * (spec.head_dim + spec.v_dim) + spec.rope)
        moved = load.batch * (ends + read) * load.torch_dtype.itemsize
        return Work(2.0 * scores * (deep + spec.v_dim), float(moved))

    @classmethod
    def examples(cls) -> tuple[tuple[LatentSpec, Load], ...]:
        return (
            (LatentSpec(128, 512, 64, 128, 128, 192**-0.5), Load(1, 4096, 4096)),
            (LatentSpec(16, 512, 64, 128, 128, 192**-0.5), Load(1, 8192, 8192)),
            (LatentSpec(32, 192, 64, 64, 64, 128**-0.5), Load(1, 8192, 8192)),
        )
