"""The chunked window backend equals the dense definition at odd lengths, and stays linear in the
length.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler import attend
from attnopt.compiler.attend_window import block_size, chunked, logits_per_query, why_not
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask
from tests.tolerance import assert_close

LENGTHS = (1, 63, 100, 257)
MASKS = (
    Mask("window", left=1),
    Mask("window", left=7, sink=2),
    Mask("window", left=64, sink=4),
    Mask("window", left=200, sink=1),
    Mask("window", left=1000, sink=16),
    Mask("window", left=9, causal=False),
    Mask("window", left=40, sink=3, causal=False),
)


def spec(mask: Mask, heads: int = 4, kv_heads: int = 2, **changes: object) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, 8, 6, 0.3, mask=mask, backend="chunked").with_(**changes)


def inputs(
    made: AttentionSpec, seq: int, batch: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, made.heads, seq, made.head_dim, dtype=dtype)
    k = torch.randn(batch, made.kv_heads, seq, made.head_dim, dtype=dtype)
    return q, k, torch.randn(batch, made.kv_heads, seq, made.v_dim, dtype=dtype)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("seq", LENGTHS)
def test_equals_the_reference(mask: Mask, seq: int) -> None:
    made = spec(mask)
    q, k, v = inputs(made, seq)
    assert_close(chunked(q, k, v, [], made), attend.reference(q, k, v, [], made))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_equals_the_reference_in_float64_with_one_head_of_keys(mask: Mask) -> None:
    made = spec(mask, kv_heads=1)
    q, k, v = inputs(made, 100, dtype=torch.float64)
    assert_close(chunked(q, k, v, [], made), attend.reference(q, k, v, [], made))


def brute_force(mask: Mask, seq: int) -> Tensor:
    rows = [[_reads(mask, i, j) for j in range(seq)] for i in range(seq)]
    return torch.tensor(rows)


def _reads(mask: Mask, i: int, j: int) -> bool:
    if mask.causal and j > i:
        return False
    return abs(i - j) < mask.left or j < mask.sink


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("seq", (1, 63, 150))
def test_reads_the_keys_that_brute_force_reads(mask: Mask, seq: int) -> None:
    """Zero logits make every weight 1 / count, so values that are a basis show each key that was
    read.
    """
    made = spec(mask, 1, 1, v_dim=seq)
    zero = torch.zeros(1, 1, seq, 8)
    out = chunked(zero, zero, torch.eye(seq)[None, None], [], made)
    assert torch.equal(out[0, 0] > 0, brute_force(mask, seq))
    assert torch.equal(mask.dense(seq, seq), brute_force(mask, seq))


def padding(seq: int) -> Tensor:
    real = torch.ones(2, seq, dtype=torch.bool)
    real[0, : seq // 3] = False
    real[1, -2:] = False
    return real


EXTRAS: dict[str, Callable[[int], list[Tensor]]] = {
    "padding": lambda seq: [padding(seq)],
    "keep": lambda seq: [torch.rand(2, 1, seq, seq) > 0.2],
    "bias": lambda seq: [torch.randn(1, 4, seq, seq)],
    "keep rows": lambda seq: [torch.rand(2, 1, 1, seq) > 0.2],
}


@pytest.mark.parametrize("extra", sorted(EXTRAS))
@pytest.mark.parametrize("fill", ("-inf", "min"))
@pytest.mark.parametrize("mask", (MASKS[1], MASKS[2], MASKS[6]), ids=str)
def test_carries_the_extras(extra: str, fill: str, mask: Mask) -> None:
    made = spec(mask, extras=(extra.split()[0],), fill=fill)
    q, k, v = inputs(made, 100)
    given = EXTRAS[extra](100)
    assert_close(chunked(q, k, v, given, made), attend.reference(q, k, v, given, made))


def test_carries_softcap_and_two_extras() -> None:
    made = spec(MASKS[2], extras=("bias", "padding"), softcap=5.0, softmax32=True)
    q, k, v = inputs(made, 63)
    given = [torch.randn(4, 63, 63), padding(63)]
    assert_close(chunked(q, k, v, given, made), attend.reference(q, k, v, given, made))


def test_more_keys_than_queries_and_fewer() -> None:
    made = spec(Mask("window", left=5, sink=1))
    for queries, keys in ((9, 40), (40, 9)):
        q = inputs(made, queries)[0]
        k, v = inputs(made, keys)[1:]
        assert_close(chunked(q, k, v, [], made), attend.reference(q, k, v, [], made))


class _Module(nn.Module):
    def __init__(self, line: str) -> None:
        super().__init__()
        self.line = line

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from attnopt.compiler.spec import parse_spec

        return attend.run(q, k, v, [], parse_spec(self.line))


def test_exports_with_dynamic_batch_and_length() -> None:
    made = spec(MASKS[2])
    shape = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    exported = torch.export.export(
        _Module(made.text), inputs(made, 100), dynamic_shapes=[shape] * 3, strict=False
    )
    module = exported.module(check_guards=False)
    for batch, seq in ((1, 5), (3, 63), (2, 257)):
        q, k, v = inputs(made, seq, batch)
        assert_close(module(q, k, v), attend.reference(q, k, v, [], made))
    names = {str(n.target).split(".")[0] for n in exported.graph.nodes if n.op == "call_function"}
    assert "attnopt" not in names


def test_runs_inside_the_canonical_op() -> None:
    made = spec(MASKS[2])
    q, k, v = inputs(made, 63)
    out = ATTENTION(q, k, v, [], made.text)
    assert_close(out, attend.reference(q, k, v, [], made))


def test_memory_is_linear_in_the_length() -> None:
    """The largest tensor of a run grows with the length, not with its square."""
    largest = []
    for seq in (1024, 2048):
        made = spec(Mask("window", left=64, sink=4), 1, 1)
        with _Largest() as seen:
            chunked(*inputs(made, seq, 1), [], made)
        largest.append(seen.elements)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] < 2048 * 2048 / 4


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_other_masks_take_the_fused_path_and_say_why() -> None:
    made = spec(CAUSAL)
    q, k, v = inputs(made, 33)
    assert "causal" in why_not(made)
    assert not why_not(spec(MASKS[0]))
    assert_close(chunked(q, k, v, [], made), attend.reference(q, k, v, [], made))


def test_logits_per_query_counts_what_is_computed() -> None:
    assert block_size(1) == 32
    assert block_size(64) == 64
    assert block_size(5000) == 128
    assert logits_per_query(Mask("window", left=64, sink=4)) == 64 + 63 + 4
    assert logits_per_query(Mask("window", left=64, causal=False)) == 64 + 63 + 63
