"""Attentions that read the same keys and values share a cache, which is written once and before any
of them reads it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attnopt.compiler.decode import derive
from tests.compiler.decode.test_derive import traced


class Twice(nn.Module):
    """Two attentions of one layer with other queries and the same keys and values. Logits are made
    of both, of the `second` alone, where the first feeds another output, or of the second and a
    `gated` first, whose place in a step is that of its gate."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.rest = form, nn.Buffer(torch.randn(4, 1, 8))
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.projections = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.embed(input_ids)
        q, other, k, v = (
            project(x).unflatten(2, (4, 8)).transpose(1, 2) for project in self.projections
        )
        first, second = (
            scaled_dot_product_attention(each, k, v, is_causal=True) for each in (q, other)
        )
        if self.form == "gated":
            on = torch.sigmoid(x[..., :4]).transpose(1, 2)[..., None] > 0.5
            first = torch.where(on, first, self.rest)
        first, second = (each.transpose(1, 2).flatten(2) for each in (first, second))
        if self.form == "second":
            return self.head(x + second), first.mean(-1)
        return self.head(x + first + second)  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["both", "second", "gated"])
def test_a_cache_is_filled_before_it_is_read_whichever_attention_is_used(form: str) -> None:
    program = traced(Twice(form), input_ids=torch.randint(0, 50, (2, 12)))
    assert len(program.sites) == 2
    decoder = derive(program)  # compares it with the program
    assert len(decoder.state(1, 8).caches) == 1
