"""FlexAttention as a way to run a spec: the same attention, compiled once for all lengths."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from attnopt.codegen import flex as module
from attnopt.codegen.flex import flex, runs_on_flex
from attnopt.compiler import attend
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask
from tests.tolerance import assert_close

SPEC = AttentionSpec(4, 2, 32, 32, 32**-0.5, CAUSAL)
WINDOWS = (Mask("window", left=5), Mask("window", 4, 3), Mask("window", 4, 2, causal=False))


@pytest.mark.parametrize("mask", [CAUSAL, *WINDOWS])
def test_the_mask_that_is_written_out_is_the_mask(mask: Mask) -> None:
    keep = module._form(SPEC.with_(mask=mask)).keep
    assert keep is not None
    i, j = torch.arange(12)[:, None], torch.arange(15)[None]
    assert torch.equal(keep(0, 0, i, j), mask.keep(i, j))
    assert module._form(SPEC.with_(mask=FULL)).keep is None


def test_one_spec_is_compiled_once_for_all_lengths() -> None:
    before = counters["stats"]["unique_graphs"]
    spec = SPEC.with_(softcap=5.0, mask=Mask("window", left=90, sink=4))
    for batch, length in ((7, 300), (7, 400), (6, 517)):
        q, k, v = (torch.randn(batch, heads, length, 32) for heads in (4, 2, 2))
        with torch.no_grad():
            got = flex(q, k, v, [], spec)
        assert_close(got, attend.reference(q.double(), k.double(), v.double(), [], spec))
    assert counters["stats"]["unique_graphs"] - before == 1


def test_what_it_does_not_run() -> None:
    assert not runs_on_flex(SPEC)
    assert "padding" in runs_on_flex(SPEC.with_(extras=("padding",)))
    assert "powers of two" in runs_on_flex(SPEC.with_(head_dim=40))
