"""The canonical op `attnopt::attention(q, k, v, extras, spec)`: kernels and gradient.

The implementation runs the backend that the spec names (`attend.run`), beside it stands the shape
kernel; the gradient recomputes the reference (what is dispatched on a GPU: the same dispatch, or
under a compiler the fused attention) and differentiates it, so every raised or rewritten graph
runs, exports, compiles and trains. `attention_step` and `latent_step` are what it is in a decoder's
step on a GPU, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler import attend, attend_step
from attnopt.compiler.spec import AttentionSpec, parse_spec


@torch.library.custom_op("attnopt::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str) -> Tensor:
    """Softmax(scale q k^T + masks) v as `spec` says; shapes as in `attnopt.compiler.spec`."""
    return as_tokens(attend.run(q, k, v, extras, parse_spec(spec)))


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str) -> Tensor:
    return _like_tokens(q, v.shape[3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, extras, spec = inputs
    ctx.spec = spec
    ctx.save_for_backward(q, k, v, *extras)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = [tensor.detach() for tensor in ctx.saved_tensors]
    needs = (*ctx.needs_input_grad[:3], *ctx.needs_input_grad[3])
    for tensor, needed in zip(saved, needs, strict=True):
        tensor.requires_grad_(needed)
    with torch.enable_grad():
        spec = parse_spec(ctx.spec)
        form = _differentiable(spec, saved[0])
        out = form(saved[0], saved[1], saved[2], saved[3:], spec)
    wanted = [tensor for tensor in saved if tensor.requires_grad]
    grads = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
    found = [next(grads) if tensor.requires_grad else None for tensor in saved]
    return found[0], found[1], found[2], found[3:], None


def _differentiable(spec: AttentionSpec, q: Tensor) -> attend.Backend:
    if spec.backend != "triton":
        return attend.reference
    if type(q) is Tensor and not torch.compiler.is_compiling():
        return attend.run  # its ways give gradients
    return attend.in_torch(spec)


attention.register_autograd(_backward, setup_context=_setup)

ATTENTION = torch.ops.attnopt.attention.default


@torch.library.custom_op("attnopt::attention_step", mutates_args=())
def attention_step(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str, end: int, ring: bool
) -> Tensor:
    """`attend_step.to_newest` or `to_ring`, dispatched."""
    run = attend_step.dispatching("attention_step")
    return as_tokens(run(q, k, v, extras, parse_spec(spec), end, ring))


@attention_step.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str, end: int, ring: bool
) -> Tensor:
    return _like_tokens(q, v.shape[3])


@torch.library.custom_op("attnopt::latent_step", mutates_args=())
def latent_step(
    q: Tensor, kept: Tensor, up_k: Tensor, up_v: Tensor, bias: Tensor, extras: Sequence[Tensor],
    spec: str, rope_at: int,
) -> Tensor:  # fmt: skip
    """`attend_latent.step`, dispatched."""
    run = attend_step.dispatching("latent_step")
    return as_tokens(run(q, kept, up_k, up_v, bias, extras, parse_spec(spec), rope_at))


@latent_step.register_fake
def _(
    q: Tensor, kept: Tensor, up_k: Tensor, up_v: Tensor, bias: Tensor, extras: Sequence[Tensor],
    spec: str, rope_at: int,
) -> Tensor:  # fmt: skip
    return _like_tokens(q, up_v.shape[1])


def as_tokens(out: Tensor) -> Tensor:
    """In memory `[batch, S, heads, dim]`, as a fake is."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _like_tokens(q: Tensor, width: int) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], width)).transpose(1, 2)
