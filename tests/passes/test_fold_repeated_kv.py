"""fold_repeated_kv: grouped copies are read at their source in every spelling; other copies are
left.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.contract import Edit, Miss, Notes, passes, read_pass
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.verify import compare
from tests.residual_models import traced, traced_family
from tests.tolerance import assert_close

HEADS, KV_HEADS, DIM = 6, 2, 4
Repeat = Callable[[Tensor], Tensor]


class Grouped(nn.Module):
    """Attention of 6 query heads over 2 key/value heads, copied by the caller's spelling."""

    def __init__(self, keys: Repeat, values: Repeat) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.q = nn.Linear(8, HEADS * DIM)
        self.k, self.v = nn.Linear(8, KV_HEADS * DIM), nn.Linear(8, KV_HEADS * DIM)
        self.out = nn.Linear(HEADS * DIM, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(2, (-1, DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(
            q, self.keys(k), self.values(v), is_causal=True
        )
        made: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return made


def expanded(x: Tensor) -> Tensor:
    batch, heads, seq, dim = x.shape
    return x[:, :, None].expand(batch, heads, 3, seq, dim).reshape(batch, heads * 3, seq, dim)


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(3, dim=1)


def indexed(x: Tensor) -> Tensor:
    return x[:, torch.tensor([0, 0, 0, 1, 1, 1])]


def tiled(x: Tensor) -> Tensor:
    return x.repeat(1, 3, 1, 1)


def scaled(x: Tensor) -> Tensor:
    return interleaved(x) * torch.arange(1.0, 7.0)[:, None, None]


def cast_before(x: Tensor) -> Tensor:
    return interleaved(x.float().mul(1.5).to(x.dtype))


def cast_after(x: Tensor) -> Tensor:
    return interleaved(x.float().mul(1.5)).to(x.dtype)


def rounded(x: Tensor) -> Tensor:
    return interleaved(x).half().float()


def through_half(x: Tensor) -> Tensor:
    """bfloat16 by way of float16, which rounds finer and reaches less far."""
    return interleaved(x).half().to(x.dtype)


def program_of(keys: Repeat, values: Repeat, dtype: torch.dtype = torch.float32) -> Program:
    model = Grouped(keys, values).to(dtype)
    program = raise_program(traced(model, torch.randn(2, 5, 8, dtype=dtype)))
    assert len(program.sites) == 1, program.unraised
    return program


def answer(program: Program) -> Edit | Miss:
    return read_pass("fold_repeated_kv{}").rewrite(program.sites[0], program, Notes(program))


@pytest.mark.parametrize("repeat", [expanded, interleaved, indexed])
def test_reads_the_heads_before_they_are_copied(repeat: Repeat) -> None:
    before = program_of(repeat, interleaved)
    after, (outcome,) = apply_pass(before, read_pass("fold_repeated_kv{}"), ("*",), Notes(before))
    assert outcome.applied
    spec = after.spec(after.sites[0])
    assert (spec.heads, spec.kv_heads) == (HEADS, KV_HEADS)
    k = after.attentions()[0].args[1]
    assert isinstance(k, torch.fx.Node)
    assert k.meta["val"].shape[1] == KV_HEADS
    assert len(after.graph.nodes) < len(before.graph.nodes)
    assert compare(before, after).same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("repeat", [cast_before, cast_after])
def test_keys_that_are_cast_on_the_way_are_read_in_the_dtype_of_queries(
    repeat: Repeat, dtype: torch.dtype
) -> None:
    """As in rotary embeddings that are worked out in float32."""
    before = program_of(repeat, interleaved, dtype)
    program, (outcome,) = apply_pass(before, read_pass("fold_repeated_kv{}"), ("*",), Notes(before))
    assert outcome.applied
    after, _ = apply_pass(program, read_pass("fuse_attention{}"), ("*",), Notes(program))
    q, k, v = after.attentions()[0].args[:3]
    dtypes = {node.meta["val"].dtype for node in (q, k, v)}  # type: ignore[union-attr]
    assert dtypes == {dtype} and k.meta["val"].shape[1] == KV_HEADS  # type: ignore[union-attr]
    x = torch.randn(2, 9, 8, dtype=dtype)
    assert_close(after(x), before(x))


@pytest.mark.parametrize("repeat", [tiled, scaled, rounded])
def test_leaves_copies_in_another_order_or_changed(repeat: Repeat) -> None:
    miss = answer(program_of(repeat, repeat))
    assert isinstance(miss, Miss)
    assert "not copies of fewer" in miss.reason


def test_leaves_copies_that_went_through_a_dtype_that_reaches_less_far() -> None:
    miss = answer(program_of(through_half, through_half, torch.bfloat16))
    assert isinstance(miss, Miss)
    assert "not copies of fewer" in miss.reason


def test_leaves_a_lone_repeat_of_the_keys() -> None:
    miss = answer(program_of(interleaved, scaled))
    assert isinstance(miss, Miss)
    assert "only one of keys and values" in miss.reason


def test_folds_a_model_once() -> None:
    _, program = traced_family("llama")
    before = raise_program(program)
    after, outcomes = apply_pass(before, read_pass("fold_repeated_kv{}"), ("*",), Notes(before))
    assert all(outcome.applied for outcome in outcomes)
    assert isinstance(answer(after), Miss)


def test_reads_back_from_its_text() -> None:
    made = passes()["fold_repeated_kv"]()
    assert read_pass(made.text) == made
