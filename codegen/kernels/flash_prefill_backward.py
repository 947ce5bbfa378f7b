"""Gradients of `flash_prefill` (FlashAttention-2, Dao 2023, algorithm 2).

With P the weights of the forward pass, O its output and G the gradient of O,

    dV = P^T G        dP = G V^T        dS = P * (dP - delta), delta_i = G_i . O_i
    dQ = scale dS K   dK = scale dS^T Q

P is computed again, tile by tile, from the rows' log-sum-exps. One kernel holds a tile of keys and
runs through the queries of all heads that share them, so that dK and dV are summed up in registers;
another holds a tile of queries and runs through the keys, for dQ. So no program adds to what
another wrote, and the same inputs give the same bits. Both leave out the tiles of which nothing is
read, as the forward pass does. Before them, one kernel works out delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.arguments import mask_arguments
from attnopt.codegen.kernel import Inputs, Kernel, Load, Outputs, Work
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.kernels.references import flash_prefill_backward as plain
from attnopt.codegen.matrix_units import matrix_units
from attnopt.codegen.pieces.attend_backward import absorb_keys, absorb_queries
from attnopt.codegen.pieces.reach import extent, key_tiles, query_tiles
from attnopt.codegen.pieces.row_ends import row_ends
from attnopt.codegen.pieces.sizes import padded_size, with_rows, with_strides
from attnopt.codegen.pieces.tiles import load_tile
from attnopt.codegen.shared_memory import loop_stages
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss, choice
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask

GRADIENTS = ("q", "k", "v", "bias", "sinks")  # what there are gradients of, in their order


@triton.jit(do_not_specialize=["queries", "keys", "offset", "left", "sink", "tiles"])
def _key_gradients(
    q, k, v, grad, ends, deltas, dk, dv, lost, row_batch, row_head,
    q_starts, k_starts, queries, keys, offset, tiles,
    bias, keep, padding, scale, cap, left, sink, data,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, CAPPED: tl.constexpr, KEEP_HOOK: tl.constexpr, SCORE_HOOK: tl.constexpr,
    SLOPE_HOOK: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Under a causal mask the first keys are read by most queries, and are begun with.
    program = tl.program_id(0)
    start = program % tiles * BLOCK_N
    shared = (program // tiles % (HEADS // GROUP)).to(tl.int64)
    b = (program // tiles // (HEADS // GROUP)).to(tl.int64)
    base, first_query, queries, first_key, keys, offset = extent(
        b, q_starts, k_starts, queries, keys, offset
    )
    if start >= keys:
        return
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    j = n[:, None]
    there = j < keys
    token = first_key + j
    in_d, in_v = (d < D)[None, :], (e < V)[None, :]
    k_at = k[0] + base * k[1] + shared * k[2] + token * k[3] + d[None, :]
    v_at = v[0] + base * v[1] + shared * v[2] + token * v[3] + e[None, :]
    k_tile = load_tile(k_at, there, in_d, True, D != BLOCK_D)
    v_tile = load_tile(v_at, there, in_v, True, V != BLOCK_V)
    q_first = q[0] + base * q[1] + first_query * q[3]
    grad_first = grad[0] + base * grad[1] + first_query * grad[3]
    row_first = base * row_batch + first_query

    edits = (bias, keep, padding, scale, cap, data)
    reach = (left, sink)
    MASK: tl.constexpr = (CAUSAL, WINDOW, SINK)
    EDITS: tl.constexpr = (CAPPED, SCORE_HOOK, KEEP_HOOK, SLOPE_HOOK)
    TILE: tl.constexpr = (D, V, BLOCK_D, BLOCK_V, BLOCK_M, PRECISION)
    first, inner, whole, last = query_tiles(
        start, tl.minimum(start + BLOCK_N, keys) - 1, queries, offset, left, sink,
        CAUSAL, WINDOW, SINK, BLOCK_M,
    )  # fmt: skip
    state = (tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32))
    # One loop over heads and tiles, for a pipeline has to be filled only once then.
    for part in tl.static_range(2):
        count = (inner - first) + (last - whole) if part else whole - inner
        for step in tl.range(0, GROUP * count):
            h = shared * GROUP + step // tl.maximum(count, 1)
            tile = step % tl.maximum(count, 1) + (first if part else inner)
            if part:
                tile = tl.where(tile < inner, tile, tile - inner + whole)
            at = row_first + h * row_head
            g_first = grad_first + h * grad[2]
            source = (q_first + h * q[2], g_first, ends + at, deltas + at, q[3], grad[3])
            state = absorb_queries(
                state, k_tile, v_tile, tile * BLOCK_M, source, (b, h, offset, queries), j, keys,
                edits, reach, MASK, EDITS, TILE, part == 1,
            )  # fmt: skip

    dk_tile, dv_tile = state
    if lost is not None:
        dv_tile += tl.load(lost[0] + b * lost[1] + shared * lost[2] + e, mask=e < V)[None, :] / keys
    dk_at = dk[0] + base * dk[1] + shared * dk[2] + token * dk[3] + d[None, :]
    dv_at = dv[0] + base * dv[1] + shared * dv[2] + token * dv[3] + e[None, :]
    tl.store(dk_at, (dk_tile * scale).to(dk[0].dtype.element_ty), mask=there & in_d)
    tl.store(dv_at, dv_tile.to(dv[0].dtype.element_ty), mask=there & in_v)


@triton.jit(do_not_specialize=["queries", "keys", "offset", "left", "sink", "tiles"])
def _query_gradients(
    q, k, v, grad, ends, deltas, dq, dbias, row_batch, row_head,
    q_starts, k_starts, queries, keys, offset, tiles,
    bias, keep, padding, scale, cap, left, sink, data,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SINK: tl.constexpr, CAPPED: tl.constexpr, KEEP_HOOK: tl.constexpr, SCORE_HOOK: tl.constexpr,
    SLOPE_HOOK: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = tiles - 1 - program % tiles
    h = (program // tiles % HEADS).to(tl.int64)
    b = (program // tiles // HEADS).to(tl.int64)
    base, first_query, queries, first_key, keys, offset = extent(
        b, q_starts, k_starts, queries, keys, offset
    )
    if block * BLOCK_M >= queries:
        return
    row = (block * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    there = row < queries
    token = first_query + row
    in_d, in_v = (d < D)[None, :], (e < V)[None, :]
    q_at = q[0] + base * q[1] + h * q[2] + token * q[3] + d[None, :]
    grad_at = grad[0] + base * grad[1] + h * grad[2] + token * grad[3] + e[None, :]
    q_tile = load_tile(q_at, there, in_d, True, D != BLOCK_D)
    g_tile = load_tile(grad_at, there, in_v, True, V != BLOCK_V)
    at = base * row_batch + h * row_head + token
    end = tl.load(ends + at, mask=there, other=float("inf"))
    delta = tl.load(deltas + at, mask=there, other=0.0)
    shared = h // GROUP
    k_first = k[0] + base * k[1] + shared * k[2] + first_key * k[3]
    v_first = v[0] + base * v[1] + shared * v[2] + first_key * v[3]
    logits = None if dbias is None else (dbias[0] + b * dbias[1] + h * dbias[2], *dbias[3:])

    source = (k_first, v_first, k[3], v[3], keys)
    rows = (b, h, offset + row, row, queries)
    edits = (bias, keep, padding, scale, cap, data)
    reach = (left, sink)
    MASK: tl.constexpr = (CAUSAL, WINDOW, SINK)
    EDITS: tl.constexpr = (CAPPED, SCORE_HOOK, KEEP_HOOK, SLOPE_HOOK)
    TILE: tl.constexpr = (D, V, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION)
    sinking, first, inner, whole, last = key_tiles(
        offset + block * BLOCK_M, offset + tl.minimum(block * BLOCK_M + BLOCK_M, queries) - 1,
        keys, left, sink, CAUSAL, WINDOW, SINK, BLOCK_N,
    )  # fmt: skip
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in tl.range(inner, whole):
        result = absorb_keys(
            result, q_tile, g_tile, end, delta, tile * BLOCK_N, source, rows, edits, reach, logits,
            MASK, EDITS, TILE, False,
        )  # fmt: skip
    for step in tl.range(0, sinking + (inner - first) + (last - whole)):
        tile = step
        if WINDOW:
            tile = tl.where(step < sinking, step, step - sinking + first)
        tile = tl.where(tile < inner, tile, tile - inner + whole)
        result = absorb_keys(
            result, q_tile, g_tile, end, delta, tile * BLOCK_N, source, rows, edits, reach, logits,
            MASK, EDITS, TILE, True,
        )  # fmt: skip
    dq_at = dq[0] + base * dq[1] + h * dq[2] + token * dq[3] + d[None, :]
    tl.store(dq_at, (result * scale).to(dq[0].dtype.element_ty), mask=there & in_d)


def flash_prefill_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    padding: Tensor | None = None,
    sinks: Tensor | None = None,
    q_starts: Tensor | None = None,
    k_starts: Tensor | None = None,
    longest: int = 0,
    longest_keys: int = 0,
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
    slope_hook: Any = None,
    data: Any = None,
    wanted: tuple[str, ...] = ("q", "k", "v"),
    precision: str = "ieee",
    block_n: int = 64,
    step_m: int = 32,
    warps: int = 4,
    stages: int = 2,
    block_m: int = 64,
    step_n: int = 32,
    q_warps: int = 4,
    q_stages: int = 2,
) -> Any:
    """The gradients of the inputs that `wanted` names, in the order of `GRADIENTS`.

    Inputs and options as of `flash_prefill`, whose output is `out`, with the log-sum-exps `lse`;
    `grad` `[batch, heads, S, V]` is the output's gradient. Gradients have the shapes and dtypes of
    their inputs; that of a bias takes `[batch, heads, S, T]` of its dtype in between. With
    sequences of various lengths, `longest_keys` are the most keys of one (0: all there are, for
    which more programs are started). A row whose every key is dropped gives zeros, be it dropped by
    a bias of the lowest number, and where `mean_of_none` its part of the mean to all values.

    A `score_hook` that adds to the logits needs nothing more; of another, `slope_hook(logits,
    batch, head, i, j, data)` is the derivative at the logits that the hook is given.
    """
    varied = q_starts is not None
    sequences = q.shape[0] if q_starts is None else q_starts.shape[0] - 1
    heads, kv_heads, depth, width = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    if grad.shape != out.shape or out.shape != (*q.shape[:3], width) or lse.shape != q.shape[:3]:
        raise ValueError(
            f"grad {list(grad.shape)}, out {list(out.shape)} and lse {list(lse.shape)} are not of "
            f"q {list(q.shape)} and v {list(v.shape)}"
        )
    for name, given in (("bias", bias), ("sinks", sinks)):
        if name in wanted and given is None:
            raise ValueError(f"there is no {name} to give a gradient of")
    q, k, v, grad, out = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, grad, out))
    q_starts, k_starts = (x if x is None else x.contiguous() for x in (q_starts, k_starts))
    lse = lse.contiguous()
    queries, keys = (longest, longest_keys or k.shape[2]) if varied else (q.shape[2], k.shape[2])
    group = heads // kv_heads
    shape = (sequences, heads, q.shape[2], k.shape[2])
    ends, deltas, lost = row_ends(out, grad, lse, q_starts, queries, mean_of_none)
    sizes = {
        "HEADS": heads, "GROUP": group, "D": depth, "V": width, "BLOCK_D": padded_size(depth),
        "BLOCK_V": padded_size(width), "CAUSAL": causal,
        "WINDOW": window, "SINK": sink > 0, "CAPPED": softcap > 0, "KEEP_HOOK": keep_hook,
        "SCORE_HOOK": score_hook, "SLOPE_HOOK": slope_hook, "PRECISION": precision,
    }  # fmt: skip
    edits = (
        with_strides(bias, *shape), with_strides(keep, *shape),
        with_strides(padding, sequences, k.shape[2]), scale, softcap, left, sink, data,
    )  # fmt: skip
    shared = (with_rows(q), with_rows(k), with_rows(v), with_rows(grad), ends, deltas)
    numbers = (*lse.stride()[:2], q_starts, k_starts, q.shape[2], k.shape[2], offset)

    def rows(like: Tensor) -> Tensor:
        """As the forward pass writes its output: heads next to each other in memory."""
        size = (like.shape[0], like.shape[2], like.shape[1], like.shape[3])
        made = torch.zeros if varied else torch.empty
        return made(size, dtype=like.dtype, device=like.device).transpose(1, 2)

    found: dict[str, Tensor] = {}
    if "q" in wanted or "bias" in wanted:
        dq = found["q"] = rows(q)
        dbias = None
        if bias is not None and "bias" in wanted:  # tiles that nothing reads are not written
            dbias = torch.zeros(shape, dtype=bias.dtype, device=q.device)
        tiles = triton.cdiv(queries, block_m)
        _query_gradients[(tiles * heads * sequences,)](
            *shared, with_rows(dq), None if dbias is None else (dbias, *dbias.stride()),
            *numbers, tiles, *edits, **sizes, BLOCK_M=block_m, BLOCK_N=step_n,
            num_warps=q_warps, num_stages=q_stages,
        )  # fmt: skip
        if bias is not None and dbias is not None:
            found["bias"] = dbias.sum_to_size(bias.shape)
    if "k" in wanted or "v" in wanted:
        dk, dv = found["k"], found["v"] = rows(k), rows(v)
        tiles = triton.cdiv(keys, block_n)
        back = None
        if lost is not None:
            total = lost.unflatten(1, (kv_heads, group)).sum((2, 3))
            back = (total, *total.stride()[:2])
        _key_gradients[(tiles * kv_heads * sequences,)](
            *shared, with_rows(dk), with_rows(dv), back, *numbers, tiles, *edits,
            **sizes, BLOCK_M=step_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if sinks is not None and "sinks" in wanted:  # a sink weighs a value of zeros
        weights = torch.where(ends.isinf(), 0.0, torch.exp(sinks.float() - lse[..., None])[..., 0])
        found["sinks"] = -(weights * deltas)[..., None].sum_to_size(sinks.shape).to(sinks.dtype)
    return tuple(found[name] for name in GRADIENTS if name in wanted)


@dataclass(frozen=True)
class FlashPrefillBackward(Kernel[AttentionSpec]):
    """`flash_prefill_backward` with its tile sizes: a program of dK and dV holds `block_n` keys and
    takes `step_m` queries at a time, one of dQ holds `block_m` queries and takes `step_n` keys."""

    name: ClassVar[str] = "flash_prefill_backward"
    source: ClassVar[str] = "FlashAttention-2 (Dao 2023)"
    launcher = staticmethod(flash_prefill_backward)

    block_n: int = choice(16, 32, 64, 128, default=64)
    step_m: int = choice(16, 32, 64, 128, default=32)
    warps: int = choice(2, 4, 8, default=4)
    stages: int = choice(1, 2, 3, default=2)
    block_m: int = choice(16, 32, 64, 128, default=64)
    step_n: int = choice(16, 32, 64, 128, default=32)
    q_warps: int = choice(2, 4, 8, default=4)
    q_stages: int = choice(1, 2, 3, default=2)

    @classmethod
    def supports(cls, spec: AttentionSpec, target: Target) -> Miss | None:
        missed = FlashPrefill.supports(spec, target)
        if missed is None and not matrix_units(target, "float16"):
            return Miss(f"Triton has no matrix units on {target.title}, and gradients need many")
        return missed

    @classmethod
    def default(cls, spec: AttentionSpec, target: Target, load: Load) -> Self:
        wide = padded_size(spec.head_dim) + padded_size(spec.v_dim)
        held, step, q_held, q_step, warps = 128, 64, 128, 64, 8
        if not matrix_units(target, load.dtype):  # all of it in registers
            held, step, q_held, q_step, warps = 32, 16, 32, 16, 4 if wide <= 128 else 8
        elif wide > 256:
            held, step, q_held, q_step = 32, 32, 64, 32
        elif target.vendor == "amd":
            held, step, q_step, warps = (128, 32, 32, 8) if wide <= 128 else (64, 32, 32, 4)
        elif wide > 128 and target.capability == "9.0":
            step = 32
        elif wide > 128 and target.capability == "10.0":
            step, q_step = 32, 32
        elif wide > 128:
            held, q_step = 64, 32
        held = min(held, max(16, triton.next_power_of_2(load.keys)))
        q_held = min(q_held, max(16, triton.next_power_of_2(load.queries)))
        row = wide * load.torch_dtype.itemsize
        stages, q_stages = (
            max(1, loop_stages(target, kept * row, streamed * row))
            for kept, streamed in ((held, step), (q_held, q_step))
        )
        q_warps = 8 if q_held == 128 else warps
        return cls(held, step, warps, stages, q_held, q_step, q_warps, q_stages)

    @classmethod
    def inputs(cls, spec: AttentionSpec, load: Load, device: str = "cpu") -> Inputs:
        """What stands for the forward pass: logits of variance one have about these ends."""
        given = FlashPrefill.inputs(spec, load, device)
        size = (load.batch, spec.heads, load.queries, spec.v_dim)
        made: dict[str, Any] = {"dtype": load.torch_dtype, "device": device}
        ends = torch.full(size[:3], log(max(1, load.keys)) + 0.5, device=device)
        return {
            **given, "grad": torch.randn(size, **made), "out": torch.randn(size, **made),
            "lse": ends,
        }  # fmt: skip

    def constants(self, spec: AttentionSpec) -> Mapping[str, Any]:
        wanted = ("q", "k", "v", *(("sinks",) if "sinks" in spec.extras else ()))
        tiles = {name: getattr(self, name) for name in self.space()}
        return {
            **mask_arguments(spec.mask), "scale": spec.scale, "softcap": spec.softcap,
            "mean_of_none": spec.fill == "min", "wanted": wanted, **tiles,
        }  # fmt: skip

    @classmethod
    def reference(cls, spec: AttentionSpec, inputs: Inputs) -> Outputs:
        return plain.flash_prefill_backward(
            **inputs, **mask_arguments(spec.mask), scale=spec.scale, softcap=spec.softcap,
            mean_of_none=spec.fill == "min",
        )  # fmt: skip

    @classmethod
    def work(cls, spec: AttentionSpec, load: Load) -> Work:
        """Five products as large as q k^T, of which two take v; every tensor and its gradient."""
        forward = FlashPrefill.work(spec, load)
        share = (3 * spec.head_dim + 2 * spec.v_dim) / (spec.head_dim + spec.v_dim)
        rows = load.batch * load.queries * spec.heads
        ends = rows * (4 + spec.v_dim * load.torch_dtype.itemsize)
        return Work(forward.flops * share, 2 * forward.bytes + ends)

    @classmethod
    def examples(cls) -> tuple[tuple[AttentionSpec, Load], ...]:
        load = Load(1, 8192, 8192)
        return tuple(
            (AttentionSpec(32, 8, depth, depth, depth**-0.5, mask), load)
            for depth in (64, 128)
            for mask in (CAUSAL, Mask("window", left=1024, sink=4))
        )
