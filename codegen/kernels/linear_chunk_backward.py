"""Gradients of `linear_chunk`, as three more linear attentions.

With G the gradient of the output, and w_ij the decay between tokens j <= i,

    dphi(q)_i = scale sum_j w_ij (G_i . v_j) phi(k)_j       queries G, keys v, values phi(k)
    dphi(k)_j = scale sum_i w_ij (v_j . G_i) phi(q)_i       queries v, keys G, values phi(q)
    dv_j      = scale sum_i w_ij (phi(k)_j . phi(q)_i) G_i  queries k, keys q, values G

the second and third backward in time. So nothing of the forward pass is kept but its inputs, no
state crosses memory, and each pass reads three tensors and writes one: 12 in all, where kernels
that keep the states of all chunks move those several times over. A normalised row o_i = n_i / m_i
adds -(G_i . o_i) to every product with G_i, and divides by m_i. The log decay g_t is part of w_ij
for j < t <= i, so that its gradient is the sum over t and later of q . dq - k . dk in features.
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
from attnopt.codegen.kernels.linear_chunk import (
    LinearChunk,
    feature_arguments,
    linear_chunk,
    tile_sizes,
)
from attnopt.codegen.kernels.references import linear_chunk_backward as plain
from attnopt.codegen.pieces.decays import decay_hook
from attnopt.codegen.pieces.feature_maps import feature_map
from attnopt.codegen.pieces.feature_rows import feature_rows, feature_slopes
from attnopt.codegen.pieces.recurrence import chunked_recurrence
from attnopt.codegen.pieces.sizes import padded_size
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss, choice
from attnopt.compiler.linear_spec import LinearSpec


@triton.jit
def _row_products(
    x, y, out, x_batch, x_head, x_token, y_batch, y_head, y_token, out_batch, out_head, tokens,
    V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.arange(0, BLOCK_V)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    there = (i < tokens)[:, None] & (e < V)[None, :]
    row = i.to(tl.int64)[:, None]
    x_tile = tl.load(
        x + b * x_batch + h * x_head + row * x_token + e[None, :], mask=there, other=0.0
    )
    y_tile = tl.load(
        y + b * y_batch + h * y_head + row * y_token + e[None, :], mask=there, other=0.0
    )
    total = tl.sum(x_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    tl.store(out + b * out_batch + h * out_head + i, total, mask=i < tokens)


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """The dot products of the rows of x and y `[batch, heads, S, channels]`, in float32."""
    batch, heads, tokens, width = x.shape
    out = torch.empty(batch, heads, tokens, dtype=torch.float32, device=x.device)
    _row_products[(triton.cdiv(tokens, 32), heads, batch)](
        x, y, out, *x.stride()[:3], *y.stride()[:3], *out.stride()[:2], tokens,
        V=width, BLOCK_V=padded_size(width), BLOCK_M=32,
    )  # fmt: skip
    return out


def by_query_head(x: Tensor | None, heads: int) -> Tensor | None:
    """Gradients of states that several query heads share, as the first head's, the others' zero."""
    if x is None or x.shape[1] == heads:
        return x
    group = heads // x.shape[1]
    rest = torch.zeros_like(x).unsqueeze(2).expand(-1, -1, group - 1, *x.shape[2:])
    return torch.cat([x.unsqueeze(2), rest], 2).flatten(1, 2)


def by_holder(x: Tensor, holders: int) -> Tensor:
    """Sums over the query heads that share one of `holders` heads."""
    return x if x.shape[1] == holders else x.unflatten(1, (holders, -1)).sum(2)


def linear_chunk_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    decay: Tensor | None = None,
    initial: Tensor | None = None,
    initial_sums: Tensor | None = None,
    out: Tensor | None = None,
    total: Tensor | None = None,
    final: Tensor | None = None,
    final_sums: Tensor | None = None,
    grad_final: Tensor | None = None,
    grad_final_sums: Tensor | None = None,
    *,
    feature: str = "identity",
    two_sided: bool = False,
    scale: float = 1.0,
    normalised: bool = False,
    eps: float = 1e-6,
    decay_kind: str = "none",
    state_heads: int = 0,
    causal: bool = True,
    with_decay: bool = True,
    precision: str = "ieee",
    block_c: int = 64,
    block_v: int = 64,
    segment: int = 0,
    warps: int = 4,
    stages: int = 2,
) -> Any:
    """The gradients of q, k and v, then those of `decay` (unless not `with_decay`), `initial` and
    `initial_sums` where given.

    Inputs and options as of `linear_chunk`, and `grad` `[batch, heads, S, V]`, the gradient of its
    output; `grad_final` and `grad_final_sums` are those of the final states. Results of the forward
    pass save running it again: `out` and `total` (what rows were divided by) where `normalised`,
    `final` and `final_sums` where their gradients and `decay` are given.
    """
    q, k, v, grad = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, grad))
    batch, heads, tokens = q.shape[:3]
    width, kv_heads, holders = v.shape[3], k.shape[1], state_heads or k.shape[1]
    made: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    options: dict[str, Any] = {
        "scale": scale, "hook": decay_hook(decay_kind), "causal": causal, "precision": precision,
        "block_c": block_c, "block_v": block_v, "segment": segment, "warps": warps,
        "stages": stages,
    }  # fmt: skip
    apart = two_sided or feature == "softmax"  # their derivatives take all channels of a row
    phi, slope = (None, None) if apart else feature_map(feature)
    q_rows, k_rows = q, k
    if apart:
        q_rows, k_rows = (feature_rows(x, feature, two_sided) for x in (q, k))
    factor = extra = None
    ends = (grad_final is not None, grad_final_sums is not None)
    lacks = decay is not None and with_decay and any(ends) and (final is None or final_sums is None)
    if (normalised and (out is None or total is None or lacks)) or (lacks and final is None):
        again = linear_chunk(
            q_rows, k_rows, v, decay, initial, initial_sums,
            feature="identity" if apart else feature, scale=scale, normalised=normalised, eps=eps,
            decay_kind=decay_kind, state_heads=holders, causal=causal, with_final=True,
            with_total=normalised, precision=precision, block_c=block_c, block_v=block_v,
            segment=segment, warps=warps, stages=stages,
        )  # fmt: skip
        out, final = again[:2]
        if normalised:
            final_sums, total = again[2:]
    if normalised and out is not None and total is not None:
        factor = torch.where(total == 0, 0.0, 1.0 / total)
        extra = -row_products(grad, out)
    steps = None
    if decay is not None:
        steps = (decay[:, None] if decay_kind == "head" else decay).expand(batch, holders, tokens)
    features = q_rows.shape[3]

    def rows(channels: int, exact: bool) -> Tensor:
        dtype = torch.float32 if exact else q.dtype
        new = torch.empty(batch, tokens, heads, channels, dtype=dtype, device=q.device)
        return new.transpose(1, 2)

    shared = kv_heads < heads  # gradients of query heads are then summed up
    dq, dk, dv = rows(features, apart), rows(features, apart or shared), rows(width, shared)
    q_dots = k_dots = None
    if decay is not None and with_decay:
        size = (triton.cdiv(features, block_v), batch, heads, tokens)
        q_dots, k_dots = torch.empty(size, **made), torch.empty(size, **made)
    inner = slope is not None or q_dots is not None
    sums = "values" if normalised else "none"
    chunked_recurrence(
        grad, v, k_rows, dq, x=q_rows if inner else None, decay=steps, factor=factor, extra=extra,
        initial=None if initial is None else initial.mT, initial_sums=initial_sums, dots=q_dots,
        value_map=phi, slope=slope, sums=sums, **options,
    )  # fmt: skip
    grad_state = by_query_head(grad_final, heads)
    grad_sums = by_query_head(grad_final_sums, heads)
    first = first_sums = None
    if initial is not None:
        first = torch.empty(batch, heads, features, width, **made)
    if initial_sums is not None:
        first_sums = torch.empty(batch, heads, features, **made)
    chunked_recurrence(
        v, grad, q_rows, dk, x=k_rows if inner else None, decay=steps, factor=factor, extra=extra,
        initial=None if grad_state is None else grad_state.mT, initial_sums=grad_sums,
        final_sums=first_sums, dots=k_dots, value_map=phi, slope=slope, sums=sums, reverse=True,
        **options,
    )  # fmt: skip
    chunked_recurrence(
        k_rows, q_rows, grad, dv, decay=steps, factor=factor, initial=grad_state, final=first,
        key_map=phi, reverse=True, **options,
    )  # fmt: skip
    dk, dv = by_holder(dk, kv_heads), by_holder(dv, kv_heads)
    if apart:
        dq = feature_slopes(q, dq, feature, two_sided)
        dk = feature_slopes(k, dk, feature, two_sided)
    given = [dq, dk.to(q.dtype), dv.to(q.dtype)]
    if q_dots is not None and k_dots is not None:
        each = by_holder((q_dots.sum(0) - k_dots.sum(0)).double(), holders)
        each = each.flip(2).cumsum(2).flip(2)  # in float64: large parts of it cancel out
        for end_grad, end in ((grad_final, final), (grad_final_sums, final_sums)):
            if end_grad is not None and end is not None:  # the end comes after every token
                each = each + (end_grad * end).flatten(2).sum(2, keepdim=True)
        given.append((each.sum((0, 2)) if decay_kind == "head" else each).float())
    if first is not None:
        given.append(by_holder(first, holders))
    if first_sums is not None:
        given.append(by_holder(first_sums, holders))
    return tuple(given)


@dataclass(frozen=True)
class LinearChunkBackward(Kernel[LinearSpec]):
    """`linear_chunk_backward` with its tile sizes, as `linear_chunk` has them."""

    name: ClassVar[str] = "linear_chunk_backward"
    source: ClassVar[str] = "RetNet (Sun et al. 2023), GLA (Yang et al. 2024)"
    launcher = staticmethod(linear_chunk_backward)

    block_c: int = choice(16, 32, 64, 128, default=64)
    block_v: int = choice(16, 32, 64, 128, 256, default=64)
    segment: int = choice(0, 128, 256, 512, 1024, 2048, 4096, 8192, default=0)
    warps: int = choice(2, 4, 8, default=4)
    stages: int = choice(1, 2, 3, 4, default=2)

    @classmethod
    def supports(cls, spec: LinearSpec, target: Target) -> Miss | None:
        return LinearChunk.supports(spec, target)

    @classmethod
    def default(cls, spec: LinearSpec, target: Target, load: Load) -> Self:
        rows = max(padded_size(spec.features), padded_size(spec.value_dim))
        heavy = spec.normalised or spec.feature in ("elu", "relu")
        heavy = heavy or (spec.decay != "none" and rows <= 128)
        apart = spec.two_sided or spec.feature == "softmax"  # rows of features are in float32
        width = min(spec.features, spec.value_dim)
        return cls(**tile_sizes(target, load, spec.heads, rows, rows, width, heavy * (1 + apart)))

    @classmethod
    def inputs(cls, spec: LinearSpec, load: Load, device: str = "cpu") -> Inputs:
        given = LinearChunk.inputs(spec, load, device)
        rows = (load.batch, spec.heads, load.queries, spec.value_dim)
        given["grad"] = torch.randn(rows, dtype=load.torch_dtype, device=device)
        if spec.final:
            states = (load.batch, spec.states, spec.features)
            given["grad_final"] = torch.randn(*states, spec.value_dim, device=device)
            if spec.normalised:
                given["grad_final_sums"] = torch.randn(states, device=device)
        return given

    def constants(self, spec: LinearSpec) -> Mapping[str, Any]:
        return {
            **feature_arguments(spec), "decay_kind": spec.decay, "state_heads": spec.states,
            "causal": spec.causal, "block_c": self.block_c, "block_v": self.block_v,
            "segment": self.segment, "warps": self.warps, "stages": self.stages,
        }  # fmt: skip

    @classmethod
    def reference(cls, spec: LinearSpec, inputs: Inputs) -> Outputs:
        return plain.linear_chunk_backward(**inputs, **feature_arguments(spec), causal=spec.causal)

    @classmethod
    def work(cls, spec: LinearSpec, load: Load) -> Work:
        """Two states are built, and read three times; gradients of all inputs are written."""
        forward = LinearChunk.work(spec, load)
        rows = load.batch * load.queries * load.torch_dtype.itemsize
        return Work(
            forward.flops * 2.5,
            2 * forward.bytes - rows * spec.heads * spec.value_dim,
        )

    @classmethod
    def examples(cls) -> tuple[tuple[LinearSpec, Load], ...]:
        return tuple(item for item in LinearChunk.examples() if item[1].queries == 8192)
