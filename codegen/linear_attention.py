"""Linear attention with gradients: `linear_chunk` forward, `linear_chunk_backward` backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.linear_chunk import LinearChunk, linear_chunk
from attnopt.codegen.kernels.linear_chunk_backward import LinearChunkBackward, linear_chunk_backward
from attnopt.codegen.target import Target
from attnopt.compiler.errors import Problem
from attnopt.compiler.linear_spec import LinearSpec


def linear_attention(
    spec: LinearSpec,
    target: Target,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    initial: Tensor | None = None,
    initial_sums: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The output, then the final states where `spec.final`, and their sums where `normalised` too.

    Tensors as `linear_chunk` takes them; gradients flow to all of them. Tile sizes are the defaults
    of the target. Raises `Problem` A826 where the kernels do not compute the spec, or where tensors
    that it names are missing.
    """
    missed = LinearChunk.supports(spec, target)
    if missed is not None:
        raise Problem(
            "A826", "no kernel for this linear attention", why=missed.reason, help=missed.help
        )
    named = {
        "decay": (spec.decay != "none", decay),
        "initial": (spec.initial, initial),
        "initial_sums": (spec.initial and spec.normalised, initial_sums),
    }
    for name, (wanted, given) in named.items():
        if wanted != (given is not None):
            said = "missing" if wanted else "not in the spec"
            raise Problem("A826", f"`{name}` is {said}", where=spec.text)
    batch, _, tokens, _ = q.shape
    load = Load(batch, tokens, tokens, str(q.dtype).removeprefix("torch."))
    forward = LinearChunk.default(spec, target, load).constants(spec)
    backward = LinearChunkBackward.default(spec, target, load).constants(spec)
    results: tuple[Tensor, ...] = _LinearAttention.apply(
        forward, backward, q, k, v, decay, initial, initial_sums
    )
    return results


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Any, backward: Any, *given: Any) -> tuple[Tensor, ...]:
        found = linear_chunk(*given, **{**forward, "with_total": forward["normalised"]})
        results = list(found) if isinstance(found, tuple) else [found]
        total = results.pop() if forward["normalised"] else None
        ctx.options = backward
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, total, *results)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        q, k, v, decay, initial, initial_sums, total, out, *states = ctx.saved_tensors
        final, final_sums = (*states, None, None)[:2]
        grad, grad_final, grad_final_sums = (*grads, None, None)[:3]
        with_decay = decay is not None and ctx.needs_input_grad[5]
        found = iter(
            linear_chunk_backward(
                q, k, v, torch.zeros_like(out) if grad is None else grad, decay=decay,
                initial=initial, initial_sums=initial_sums, out=out, total=total, final=final,
                final_sums=final_sums, grad_final=grad_final, grad_final_sums=grad_final_sums,
                with_decay=with_decay, **ctx.options,
            )
        )  # fmt: skip
        there = (True, True, True, with_decay, initial is not None, initial_sums is not None)
        return (None, None, *(next(found) if x else None for x in there))
