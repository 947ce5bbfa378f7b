"""One attention under a mask of the caller's spelling, traced and raised: for tests of the mask
probe.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace

HEADS, HEAD_DIM, LONGEST = 2, 4, 64
Spelling = Callable[["Masked", Tensor, Tensor], Tensor]


class Masked(nn.Module):
    """Self-attention of `x` [batch, seq, 8] with itself; `spelling(self, x, attention_mask)` makes
    the mask.
    """

    def __init__(self, spelling: Spelling, fused: bool) -> None:
        super().__init__()
        self.spelling, self.fused = spelling, fused
        square = torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()
        self.register_buffer("triangle", square[None, None])
        lie = square.clone()
        lie[50, 51] = True
        self.register_buffer("lie", lie)
        self.register_buffer("added", torch.full((LONGEST, LONGEST), float("-inf")).triu(1))
        self.register_buffer("positions", torch.arange(LONGEST)[None])
        self.register_buffer("noise", torch.randn(LONGEST, LONGEST))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        heads = x.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
        mask = self.spelling(self, x, attention_mask)
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
            return y + 0 * attention_mask.sum()
        scores = heads @ heads.transpose(-1, -2) * HEAD_DIM**-0.5
        kept = (
            scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        )
        return kept.softmax(-1) @ heads + 0 * attention_mask.sum()


def masked(spelling: Spelling, fused: bool = True, length: int = 7) -> Program:
    """The raised program of one attention under a mask; both inputs of the given length, batch
    3.
    """
    x = torch.randn(3, length, HEADS * HEAD_DIM)
    real = torch.ones(3, length, dtype=torch.int64)
    real[1, -2:] = 0
    inputs = {"x": x, "attention_mask": real}
    model = Masked(spelling, fused).eval()
    program = raise_program(trace(Loaded(model, None, (), inputs, "masked", "callable")))
    assert len(program.sites) == 1, program.unraised
    return program
