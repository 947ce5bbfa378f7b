"""What `linear_chunk_backward` computes: autograd of `linear_chunk`'s reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.kernels.references.linear_chunk import linear_chunk


def linear_chunk_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, decay: Tensor | None = None,
    initial: Tensor | None = None, initial_sums: Tensor | None = None,
    grad_final: Tensor | None = None, grad_final_sums: Tensor | None = None, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of q, k, v and of what is given among decay, initial and initial_sums."""
    given = [q, k, v, decay, initial, initial_sums]
    leaves = [None if x is None else x.detach().requires_grad_() for x in given]
    with torch.enable_grad():
        out, final, sums = linear_chunk(*leaves, **options)  # type: ignore[arg-type]
    ends = [(out, grad)]
    for x, x_grad in ((final, grad_final), (sums, grad_final_sums)):
        if x_grad is not None:
            group = x.shape[1] // x_grad.shape[1]
            ends.append((x[:, ::group], x_grad.to(x.dtype)))
    kept = [x for x in leaves if x is not None]
    return torch.autograd.grad([x for x, _ in ends], kept, [g for _, g in ends])
