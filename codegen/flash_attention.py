"""Attention with gradients: `flash_prefill` forward, `flash_prefill_backward` backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.flash_prefill import FlashPrefill, flash_prefill
from attnopt.codegen.kernels.flash_prefill_backward import (
    GRADIENTS,
    FlashPrefillBackward,
    flash_prefill_backward,
)
from attnopt.codegen.shipped import chosen
from attnopt.codegen.target import Target
from attnopt.codegen.ways import misses
from attnopt.compiler.contract import Miss
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import AttentionSpec


def flash_attention(
    spec: AttentionSpec, target: Target, q: Tensor, k: Tensor, v: Tensor, *extras: Tensor
) -> Tensor:
    """The attention of a spec, shapes as in `attnopt.compiler.spec`, with gradients to whatever of
    q, k, v, the bias and the sinks requires one.

    Raises `Problem` A827 where the kernels do not compute the spec.
    """
    load = Load(q.shape[0], q.shape[2], k.shape[2], str(q.dtype).removeprefix("torch."))
    run = differentiable(spec, target, load)
    if isinstance(run, Miss):
        raise Problem("A827", "no kernels for this attention", why=run.reason, help=run.help)
    return run(q, k, v, *extras)


def differentiable(
    spec: AttentionSpec, target: Target, load: Load, device: str = ""
) -> Callable[..., Tensor] | Miss:
    """A function of (q, k, v, *extras) with gradients, its tiles chosen for the sizes (and the
    device of that name); or why there is none."""
    missed = misses(FlashPrefillBackward, spec, target, load)
    if missed is not None:
        return Miss(f"its gradients: {missed.reason}", missed.help)
    forward = chosen(FlashPrefill, spec, target, load, device).constants(spec)
    backward = chosen(FlashPrefillBackward, spec, target, load, device).constants(spec)
    names = spec.extras

    def run(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
        out: Tensor = _FlashAttention.apply(names, forward, backward, q, k, v, *extras)
        return out

    return run


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, names: tuple[str, ...], forward: Mapping[str, Any], backward: Mapping[str, Any],
        q: Tensor, k: Tensor, v: Tensor, *extras: Tensor,
    ) -> Tensor:  # fmt: skip
        given: dict[str, Any] = dict(zip(names, extras, strict=True))
        out, lse = flash_prefill(q, k, v, **given, **forward, with_lse=True)
        ctx.names, ctx.options = names, backward
        ctx.save_for_backward(q, k, v, out, lse, *extras)
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *extras = ctx.saved_tensors
        order = ("q", "k", "v", *ctx.names)
        asked = {x for x, needs in zip(order, ctx.needs_input_grad[3:], strict=True) if needs}
        wanted = tuple(name for name in GRADIENTS if name in asked)
        given = dict(zip(ctx.names, extras, strict=True))
        options = {**ctx.options, "wanted": wanted}
        found = flash_prefill_backward(q, k, v, grad, out, lse, **given, **options)
        by_name = dict(zip(wanted, found, strict=True))
        return None, None, None, *(by_name.get(name) for name in order)
