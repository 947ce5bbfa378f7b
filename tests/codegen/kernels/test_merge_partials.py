"""Partial results of attention, merged."""

from __future__ import annotations

import math

import pytest
import torch

from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.merge_partials import MergePartials, MergeSpec, merge_partials
from attnopt.codegen.kernels.references import merge_partials as plain
from attnopt.codegen.target import target
from tests.tolerance import assert_close


@pytest.mark.parametrize("v_dim", [32, 33, 40, 57, 80, 128, 192, 512])
@pytest.mark.parametrize("parts", [1, 2, 5, 17])
def test_merging_agrees_with_the_reference(v_dim: int, parts: int) -> None:
    spec, load = MergeSpec(2, v_dim, parts), Load(2, 3, dtype="float32")
    inputs = MergePartials.inputs(spec, load)
    inputs["lse"] = inputs["lse"] * 20
    wide = {"parts": inputs["parts"].double(), "lse": inputs["lse"].double()}
    want = plain.merge_partials(**wide)
    for kernel in (MergePartials.default(spec, target("h100"), load), MergePartials(4, 4)):
        assert_close(kernel.run(spec, inputs), want[0], kernel.text)
    got = merge_partials(inputs["parts"], inputs["lse"], with_lse=True)
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])


def test_merging_gives_what_attention_over_all_keys_gives() -> None:
    q, k = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 90, 16)
    v = torch.randn(2, 3, 90, 24)
    logits = q @ k.transpose(2, 3)
    cuts = ((0, 7), (7, 8), (8, 90))
    parts = [logits[..., a:b].softmax(3) @ v[:, :, a:b] for a, b in cuts]
    lse = [logits[..., a:b].logsumexp(3) for a, b in cuts]
    got, total = merge_partials(torch.stack(parts), torch.stack(lse), with_lse=True)
    assert_close(got, logits.softmax(3) @ v)
    assert_close(total, logits.logsumexp(3))
    apart = merge_partials(
        tuple(part[None] for part in parts), tuple(one[None] for one in lse), block_parts=1
    )
    assert_close(apart, got)


def test_empty_sets_are_not_read_and_all_empty_gives_zeros() -> None:
    parts, lse = torch.randn(4, 1, 2, 3, 32), torch.randn(4, 1, 2, 3)
    lse[1], lse[2, 0, 1], lse[:, 0, 0, 2] = -math.inf, -math.inf, -math.inf
    parts[lse.isneginf()] = math.nan
    got, total = merge_partials(parts, lse, with_lse=True, block_rows=2, block_parts=2)
    want = plain.merge_partials(parts, lse)
    assert_close(got, want[0])
    assert bool((got[0, 0, 2] == 0).all())
    assert torch.equal(total.isneginf(), want[1].isneginf())
    assert bool(total[0, 0, 2].isneginf()) and bool(total[0, 1, 2].isfinite())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_and_strided_outputs(dtype: torch.dtype) -> None:
    parts, lse = torch.randn(3, 2, 2, 4, 48).to(dtype), torch.randn(3, 2, 2, 4)
    room = torch.zeros(2, 2, 4, 60, dtype=dtype)
    got = merge_partials(parts, lse, room[..., :48], block_rows=8, block_parts=4)
    assert got.data_ptr() == room.data_ptr() and got.dtype == dtype
    assert_close(got, plain.merge_partials(parts.double(), lse.double())[0])
    assert bool((room[..., 48:] == 0).all())


def test_large_log_sum_exps_do_not_overflow() -> None:
    parts, lse = torch.randn(2, 1, 1, 1, 16), torch.tensor([1000.0, 1001.0]).reshape(2, 1, 1, 1)
    assert_close(merge_partials(parts, lse), plain.merge_partials(parts.double(), lse.double())[0])


def test_parts_that_lie_apart_are_read_and_outputs_that_do_are_refused() -> None:
    parts, lse = torch.randn(3, 2, 2, 16, 4).mT, torch.randn(3, 2, 2, 4)
    assert_close(merge_partials(parts, lse), plain.merge_partials(parts.double(), lse.double())[0])
    with pytest.raises(ValueError, match="dense in its last dimension"):
        merge_partials(parts, lse, torch.zeros(2, 2, 16, 4).mT)
