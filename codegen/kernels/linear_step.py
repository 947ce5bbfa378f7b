"""Linear attention of one new token, or a few: the state is read, updated and written in place.

A step moves the state once each way, whatever the length of what came before, and hardly anything
else; all else serves to keep that stream wide. A program holds all rows of a tile of columns, so
that its result is whole and nothing is added up across programs; tiles are narrow, so that a few
sequences already fill the device with loads. Sums of keys (`normalised`) belong to all columns of
a head and are updated in place too, so there one program holds the whole state of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.kernel import Inputs, Kernel, Load, Outputs, Work
from attnopt.codegen.kernels.linear_chunk import LinearChunk, feature_arguments
from attnopt.codegen.kernels.references.linear_step import linear_step as plain
from attnopt.codegen.pieces.decays import decay_hook
from attnopt.codegen.pieces.feature_maps import feature_map, feature_place, mapped
from attnopt.codegen.pieces.online_softmax import LOG2E
from attnopt.codegen.pieces.sizes import padded_size
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss, choice
from attnopt.compiler.linear_spec import LinearSpec


@triton.jit
def _features(x, channel, D: tl.constexpr, MAP: tl.constexpr, SIDES: tl.constexpr):
    """phi of one row, in float32."""
    there = channel < D
    row = tl.load(x + channel, mask=there, other=0.0).to(tl.float32)
    row = mapped(row[None, :], there[None, :], MAP, SIDES)
    return tl.reshape(row, [channel.shape[0] * SIDES])


@triton.jit
def _linear_step(
    q, k, v, out, state, sums, decay,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    out_batch, out_head, out_token, state_batch, state_head, state_row, tokens, scale, eps,
    GROUP: tl.constexpr, KV_GROUP: tl.constexpr, ONCE: tl.constexpr, HOOK: tl.constexpr,
    MAP: tl.constexpr, SIDES: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    holder = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row, some = feature_place(tl.arange(0, BLOCK_D * SIDES), D, SIDES)
    there = some[:, None] & (e < V)[None, :]
    at = state + b * state_batch + holder * state_head + row[:, None] * state_row + e[None, :]
    now = tl.load(at, mask=there, other=0.0)
    if sums is not None:
        sums_at = sums[0] + b * sums[1] + holder * sums[2] + row * sums[3]
        total = tl.load(sums_at, mask=some, other=0.0)
    k += b * k_batch + holder // KV_GROUP * k_head
    v += b * v_batch + holder // KV_GROUP * v_head
    q += b * q_batch + holder * GROUP * q_head
    out += b * out_batch + holder * GROUP * out_head
    held = 0.0 if ONCE is None else ONCE(decay, b, holder)
    for n in tl.range(0, tokens):
        t = tl.cast(n, tl.int64)
        key = _features(k + t * k_token, d, D, MAP, SIDES)
        value = tl.load(v + t * v_token + e, mask=e < V, other=0.0).to(tl.float32)
        if HOOK is not None:
            step = HOOK(
                decay, held, b, holder, tl.full([1], 0, tl.int32) + n, tl.full([1], 1, tl.int1)
            )
            left = tl.exp2(tl.sum(step, 0) * LOG2E)
            now *= left
            if sums is not None:
                total *= left
        now += key[:, None] * value[None, :]
        if sums is not None:
            total += key
        for g in tl.static_range(GROUP):
            query = _features(q + g * q_head + t * q_token, d, D, MAP, SIDES) * scale
            result = tl.sum(query[:, None] * now, 0)
            if sums is not None:
                bottom = tl.sum(query * total, 0) + eps
                result *= tl.where(bottom == 0.0, 0.0, 1.0 / bottom)
            result = result.to(out.dtype.element_ty)
            tl.store(out + g * out_head + t * out_token + e, result, mask=e < V)
    tl.store(at, now, mask=there)
    if sums is not None:
        tl.store(sums_at, total, mask=some)


def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    sums: Tensor | None = None,
    decay: Tensor | None = None,
    *,
    feature: str = "identity",
    two_sided: bool = False,
    scale: float = 1.0,
    normalised: bool = False,
    eps: float = 1e-6,
    decay_kind: str = "none",
    block_v: int = 32,
    warps: int = 4,
) -> Any:
    """The next tokens of `linear_chunk`, whose final states are these states.

    q `[batch, heads, S, D]`, k `[batch, kv_heads, S, D]`, v `[batch, kv_heads, S, V]` in fp16, bf16
    or fp32, their last dimension dense; the result is `[batch, heads, S, V]`, in memory
    `[batch, S, heads, V]`. `state` `[batch, state_heads, features, V]`, its last dimension dense,
    and `sums` `[batch, state_heads, features]` where `normalised`, both float32, are updated in
    place. `decay` as `linear_chunk` takes it. `block_v` spans all of V where `normalised`.

    Returns the output, the state, and the sums where `normalised`. Raises `ValueError` where the
    state is not dense in its last dimension.
    """
    if state.stride(3) != 1:
        raise ValueError("a state that is updated in place must be dense in its last dimension")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, tokens, depth = q.shape
    width, holders = v.shape[3], state.shape[1]
    out = torch.empty(batch, tokens, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    hook = decay_hook(decay_kind)
    if decay is not None:
        decay = (decay[:, None] if decay_kind == "head" else decay).expand(batch, holders, tokens)
    wide = padded_size(width) if normalised else block_v
    _linear_step[(triton.cdiv(width, wide), holders, batch)](
        q, k, v, out, state, (sums, *sums.stride()) if normalised and sums is not None else None,
        None if decay is None else (decay, *decay.stride()),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *state.stride()[:3],
        tokens, scale, eps, GROUP=heads // holders, KV_GROUP=holders // k.shape[1],
        ONCE=hook[0], HOOK=hook[1], MAP=feature_map(feature)[0], SIDES=2 if two_sided else 1,
        D=depth, V=width, BLOCK_D=padded_size(depth), BLOCK_V=wide, num_warps=warps,
    )  # fmt: skip
    return (out, state, sums) if normalised else (out, state)


@dataclass(frozen=True)
class LinearStep(Kernel[LinearSpec]):
    """`linear_step` with the columns of a program's state."""

    name: ClassVar[str] = "linear_step"
    source: ClassVar[str] = "Transformers are RNNs (Katharopoulos et al. 2020)"
    launcher = staticmethod(linear_step)

    block_v: int = choice(16, 32, 64, 128, 256, default=32)
    warps: int = choice(1, 2, 4, 8, 16, default=4)

    @classmethod
    def supports(cls, spec: LinearSpec, target: Target) -> Miss | None:
        if not spec.causal:
            return Miss("steps have an order, and the spec is not causal")
        return LinearChunk.supports(spec, target)

    @classmethod
    def default(cls, spec: LinearSpec, target: Target, load: Load) -> Self:
        rows = padded_size(spec.key_dim) * (2 if spec.two_sided else 1)
        wide = padded_size(spec.value_dim)
        if not spec.normalised:
            wide = min(wide, 32)
        # 32 numbers of the state per thread: one load of it is then enough to fill the memory bus.
        return cls(wide, max(1, min(16, rows * wide // 1024)))

    @classmethod
    def inputs(cls, spec: LinearSpec, load: Load, device: str = "cpu") -> Inputs:
        given = LinearChunk.inputs(spec.with_(initial=True), load, device)
        names = {"initial": "state", "initial_sums": "sums"}
        return {names.get(key, key): value for key, value in given.items()}

    def constants(self, spec: LinearSpec) -> Mapping[str, Any]:
        return {
            **feature_arguments(spec), "decay_kind": spec.decay, "block_v": self.block_v,
            "warps": self.warps,
        }  # fmt: skip

    @classmethod
    def reference(cls, spec: LinearSpec, inputs: Inputs) -> Outputs:
        out, state, sums = plain(**inputs, **feature_arguments(spec))
        return (out, state, sums) if spec.normalised else (out, state)

    @classmethod
    def work(cls, spec: LinearSpec, load: Load) -> Work:
        return LinearChunk.work(spec.with_(initial=True, final=True), load)

    @classmethod
    def examples(cls) -> tuple[tuple[LinearSpec, Load], ...]:
        def retention(depth: int) -> LinearSpec:
            return LinearSpec(32, 32, depth, depth, scale=depth**-0.5, decay="head")

        gated = LinearSpec(32, 8, 128, 128, "elu", normalised=True, decay="token")
        hedgehog = LinearSpec(32, 8, 64, 64, "softmax", True, normalised=True)
        return tuple(
            (spec, Load(8, 1, 1)) for spec in (retention(64), retention(128), gated, hedgehog)
        )
