"""Attention maps whose figures are known, and rows as the definition has them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnopt.compiler import attend
from attnopt.compiler.diagnostics import some_weights
from attnopt.compiler.diagnostics.diagnose import diagnose
from attnopt.compiler.diagnostics.diagnosis import SiteDiagnosis
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask
from tests.programs import one_attention
from tests.tolerance import assert_close

SEQ = 40
SPEC = AttentionSpec(2, 2, head_dim=SEQ, v_dim=4, scale=1.0, mask=CAUSAL)


def measured(program: Program, q: Tensor, k: Tensor, *extras: Tensor) -> SiteDiagnosis:
    """The figures of one attention on given operands."""
    v = program.example.args[2]
    batch = Batch((q, k, v[: len(q)], list(extras)))
    (site,) = diagnose(program, [batch]).sites
    return site


def one_hot_logits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Operands whose logits are the given `[heads, S, T]`, in one sequence."""
    return rows[None].double(), torch.eye(SEQ, dtype=torch.float64).expand(1, len(rows), SEQ, SEQ)


def test_uniform_attention_has_the_entropy_of_the_keys_it_may_read() -> None:
    program = one_attention(SPEC, batch=1, seq=SEQ)
    site = measured(program, *one_hot_logits(torch.zeros(2, SEQ, SEQ)))
    counts = torch.arange(2, SEQ + 1).double()  # the first query may read one key and says nothing
    assert site.per_head["entropy"] == pytest.approx([float(counts.log().mean())] * 2, abs=1e-5)
    assert site.per_head["entropy_share"] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert site.per_head["sink"] == pytest.approx(
        [float((4 / counts).clamp(max=1).mean())] * 2, abs=1e-5
    )
    assert site.queries == SEQ - 1
    assert site.per_head["distance"] == pytest.approx([10.0, 10.0], abs=1e-4)  # i / 2 each


def test_a_head_that_reads_the_token_before_is_local_and_sure() -> None:
    sure = 60.0 * torch.eye(SEQ).roll(-1, dims=1)
    sure[0] = 0
    first = torch.zeros(SEQ, SEQ)
    first[:, 0] = 60.0
    site = measured(
        one_attention(SPEC, batch=1, seq=SEQ), *one_hot_logits(torch.stack((sure, first)))
    )
    previous, sink = range(2)
    assert site.per_head["entropy"][previous] == pytest.approx(0, abs=1e-5)
    assert site.per_head["distance"][previous] == pytest.approx(1)
    assert site.per_head["local_5"][previous] == 1 and site.per_head["lost_5"][previous] == 0
    assert site.per_head["sink"][sink] == 1 and site.per_head["lost_5"][sink] == 0
    near = sum(1 for i in range(1, SEQ) if i < 5) / (SEQ - 1)
    assert site.per_head["local_5"][sink] == pytest.approx(near, abs=1e-5)


def test_equal_maps_are_alike_and_disjoint_ones_are_not() -> None:
    first, second = torch.zeros(2, SEQ, SEQ).unbind()
    first[:, 0], second[:, 1] = 60.0, 60.0
    program = one_attention(SPEC, batch=1, seq=SEQ)
    same = measured(program, *one_hot_logits(torch.stack((first, first))))
    assert same.similarity["maps"] == ((1.0, 1.0), (1.0, 1.0))
    other = measured(program, *one_hot_logits(torch.stack((first, second))))
    assert other.similarity["maps"][0][1] < 1e-3


def test_keys_that_padding_drops_are_not_counted_and_first_keys_are_real_ones() -> None:
    spec = SPEC.with_(mask=Mask("full"), extras=("padding",))
    padding = torch.ones(1, SEQ, dtype=torch.bool)
    padding[0, :10] = False
    program = one_attention(spec, batch=1, seq=SEQ, extras=[padding])
    q, k = one_hot_logits(torch.zeros(2, SEQ, SEQ))
    site = measured(program, q, k, padding)
    assert site.per_head["entropy"] == pytest.approx([math.log(SEQ - 10)] * 2, abs=1e-5)
    assert site.per_head["entropy_share"] == pytest.approx([1.0, 1.0], abs=1e-5)


def test_a_mask_spelled_as_a_bias_limits_what_may_be_read() -> None:
    bias = torch.zeros(1, 1, SEQ, SEQ, dtype=torch.float64)
    bias[..., 20:] = torch.finfo(torch.float64).min
    spec = SPEC.with_(mask=Mask("full"), extras=("bias",))
    program = one_attention(spec, batch=1, seq=SEQ, extras=[bias])
    site = measured(program, *one_hot_logits(torch.zeros(2, SEQ, SEQ)), bias)
    assert site.per_head["entropy"] == pytest.approx([math.log(20)] * 2, abs=1e-5)
    assert "later tokens" in site.missing["retrieval"]


def test_what_goes_to_a_sink_logit_is_told_and_not_counted_as_a_key() -> None:
    sinks = torch.full((1, 2, 1, 1), math.log(SEQ), dtype=torch.float64)
    spec = SPEC.with_(mask=Mask("full"), extras=("sinks",))
    program = one_attention(spec, batch=1, seq=SEQ, extras=[sinks])
    site = measured(program, *one_hot_logits(torch.zeros(2, SEQ, SEQ)), sinks)
    assert site.per_head["no_key"] == pytest.approx([0.5, 0.5], abs=1e-5)
    assert site.per_head["entropy_share"] == pytest.approx([1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"mask": Mask("window", left=5, sink=2)}, ()),
        ({"mask": Mask("window", left=5, causal=False)}, ("bias",)),
        ({"softcap": 2.0}, ("padding", "bias")),
        ({"kv_heads": 1}, ("keep",)),
        ({}, ("sinks", "bias", "padding")),
        ({"mask": Mask("full"), "fill": "min"}, ("keep",)),
    ],
)
def test_slices_are_rows_of_the_definition(
    changes: dict[str, object], names: tuple[str, ...]
) -> None:
    made = {
        "bias": torch.randn(2, 2, 13, 13, dtype=torch.float64),
        "keep": torch.rand(2, 1, 13, 13) > 0.3,
        "padding": torch.rand(2, 13) > 0.2,
        "sinks": torch.randn(1, 2, 1, 1, dtype=torch.float64),
    }
    spec = SPEC.with_(head_dim=6, scale=0.4, extras=names, **changes)
    extras = [made[name] for name in names]
    q, k = one_attention(spec, batch=2, seq=13, extras=extras).example.args[:2]
    whole = attend.weights(q, k, extras, spec)
    for row in range(2):
        at = torch.tensor([1, 4, 5, 12])
        (part,) = some_weights.slices(q, k, extras, spec, row, at)
        assert_close(part.weights, whole[row, :, at])


def test_slices_stay_under_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = one_attention(SPEC, batch=1, seq=SEQ).example.args[:2]
    (whole,) = some_weights.slices(q, k, [], SPEC, 0, torch.arange(SEQ))
    monkeypatch.setattr(some_weights, "CAP_BYTES", 8 * 8 * 2 * SEQ * 3)
    parts = list(some_weights.slices(q, k, [], SPEC, 0, torch.arange(SEQ)))
    assert max(len(part.i) for part in parts) == 3
    assert_close(torch.cat([part.weights for part in parts], 1), whole.weights)
