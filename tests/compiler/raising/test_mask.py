"""The mask probe: classes proved from the graph in any spelling, lies not believed, biases told
apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.raising.evaluate import Evaluator
from attnopt.compiler.raising.mask import MaskFacts, classify
from attnopt.compiler.spec import CAUSAL, FULL, Mask
from attnopt.compiler.trace import trace
from tests.masked_attention import HEADS, Masked, Spelling, masked
from tests.residual_models import traced_family

INF = float("-inf")
LOWEST = torch.finfo(torch.float32).min


def facts_of(program: Program) -> MaskFacts:
    return classify(program, program.attentions()[0])


def ij(x: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(x.shape[1])
    return at[:, None], at[None, :]


def square(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)


def band(m: Masked, x: Tensor, a: Tensor) -> Tensor:
    i, j = ij(x)
    return (j <= i) & (i - j < 5)


def sinks(m: Masked, x: Tensor, a: Tensor) -> Tensor:
    i, j = ij(x)
    return torch.logical_and(j <= i, torch.logical_or(j > i - 5, j < 2))


def near(m: Masked, x: Tensor, a: Tensor) -> Tensor:
    i, j = ij(x)
    return (i - j).abs() < 3


def additive(m: Masked, x: Tensor, a: Tensor) -> Tensor:
    n = x.shape[1]
    return torch.triu(torch.full((n, n), INF), diagonal=1)


def additive_padding(m: Masked, x: Tensor, a: Tensor) -> Tensor:
    i, j = ij(x)
    keep = (j <= i)[None, None] & (a[:, None, None, :] > 0)
    return torch.zeros(keep.shape).masked_fill(~keep, LOWEST)


def packed_but_one(m: Masked, x: Tensor, a: Tensor) -> Tensor:
    """Documents told from jumps in the positions, which a plain arange never makes."""
    positions = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
    jumps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    document = jumps.cumsum(-1)
    i, j = ij(x)
    return ((document[:, :, None] == document[:, None, :]) & (j <= i))[:, None]


PROVED: dict[str, tuple[Spelling, Mask, bool]] = {
    "ones.tril": (lambda m, x, a: square(x).tril(), CAUSAL, False),
    "arange": (lambda m, x, a: ij(x)[1] <= ij(x)[0], CAUSAL, False),
    "flipped": (lambda m, x, a: ~(ij(x)[0] < ij(x)[1]), CAUSAL, False),
    "buffer": (lambda m, x, a: m.triangle[:, :, : x.shape[1], : x.shape[1]], CAUSAL, False),
    "added buffer": (lambda m, x, a: m.added[: x.shape[1], : x.shape[1]], CAUSAL, False),
    "added": (additive, CAUSAL, False),
    "position buffer": (lambda m, x, a: m.positions[0, : x.shape[1], None]
                        >= m.positions[:, : x.shape[1]], CAUSAL, False),
    "window": (band, Mask("window", left=5), False),
    "sinks": (sinks, Mask("window", left=5, sink=2), False),
    "two-sided": (near, Mask("window", left=3, causal=False), False),
    "everything": (lambda m, x, a: ij(x)[0] + 0 * ij(x)[1] >= 0, FULL, False),
    "padding": (lambda m, x, a: a[:, None, None, :].bool(), FULL, True),
    "inverted padding": (lambda m, x, a: ~(a == 0)[:, None, None, :].expand(-1, 1, x.shape[1], -1),
                         FULL, True),
    "causal padding": (lambda m, x, a: square(x).tril() & (a != 0)[:, None, None, :], CAUSAL, True),
    "added padding": (additive_padding, CAUSAL, True),
    "split heads": (lambda m, x, a: a.bool()[:, None, None, :].expand(-1, HEADS, 1, -1)
                    .reshape(-1, 1, x.shape[1]).view(-1, HEADS, 1, x.shape[1]), FULL, True),
    "one document": (packed_but_one, CAUSAL, False),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVED)
def test_proves_the_class_of_a_spelling(name: str) -> None:
    spelling, mask, padded = PROVED[name]
    program = masked(spelling)
    facts = facts_of(program)
    assert (facts.certainty, facts.reason) == ("proved", "")
    assert facts.mask == mask
    assert (facts.padding == "attention_mask") is padded
    assert not facts.bias
    assert_equals_its_class(program, facts)


def assert_equals_its_class(program: Program, facts: MaskFacts) -> None:
    """The mask tensor of the graph, run at two lengths, drops exactly the keys that the class
    drops.
    """
    (extra,) = program.attentions()[0].args[3]  # type: ignore[misc, union-attr]
    assert facts.mask is not None
    for length in (5, 19):
        real = (torch.rand(3, length) < 0.6).long()
        x = torch.randn(3, length, 8)
        sizes = {
            str(s.node.expr): n
            for s, n in zip(_sizes(program), (3, length, 3, length), strict=True)
        }
        value = Evaluator(program, sizes, inputs={"x": x, "attention_mask": real})(extra)
        keep = value if value.dtype == torch.bool else value > LOWEST
        expected = facts.mask.dense(length, length)[None, None]
        if facts.padding:
            expected = expected & real.bool()[:, None, None, :]
        assert torch.equal(keep.expand(3, HEADS, length, length), expected.expand(3, HEADS, -1, -1))


def _sizes(program: Program) -> list[Any]:
    x, real = (program.node(name).meta["val"].shape for name in ("x", "attention_mask"))
    return [x[0], x[1], real[0], real[1]]


@pytest.mark.parametrize("spelling", [additive, additive_padding, band])
def test_reads_the_eager_spelling_alike(spelling: Spelling) -> None:
    fused, eager = facts_of(masked(spelling)), facts_of(masked(spelling, fused=False))
    assert (eager.mask, eager.padding, eager.certainty) == (fused.mask, fused.padding, "proved")
    assert eager.fill == ("min" if spelling is additive_padding else "-inf")


def test_causal_up_to_length_40_is_proved_to_be_no_class() -> None:
    facts = facts_of(masked(lambda m, x, a: (ij(x)[1] <= ij(x)[0]) | (ij(x)[0] >= 40)))
    assert facts.mask is None
    assert facts.text == "tensor"
    assert "none of full, causal" in facts.reason


def test_a_lie_that_the_proof_cannot_read_is_observed_only() -> None:
    facts = facts_of(masked(lambda m, x, a: (ij(x)[1] <= ij(x)[0]) | (ij(x)[0] * ij(x)[0] >= 1600)))
    assert facts.mask == CAUSAL
    assert facts.certainty == "observed"
    assert "multiplied" in facts.reason
    assert facts.at


def test_a_lie_at_the_examples_own_length_is_seen() -> None:
    def spelling(m: Masked, x: Tensor, a: Tensor) -> Tensor:
        i, j = ij(x)
        return (j <= i) | (i * i >= 625)

    facts = facts_of(masked(spelling, length=30))
    assert (facts.mask, facts.text) == (None, "tensor")


def attending(keep: Callable[[Tensor, Tensor], Tensor], **inputs: Tensor) -> MaskFacts:
    """The facts of `x` attending to `y`, or to itself; `keep(scores, y)` says which keys count."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q, k = self.q(x)[:, None], self.q(y if y.dim() == 3 else x)[:, None]
            k = nn.functional.avg_pool2d(k, (2, 1)) if y.dim() == 1 else k
            scores = q @ k.transpose(-1, -2)
            return scores.masked_fill(~keep(scores, y), INF).softmax(-1) @ k + 0 * y.sum()

    made = trace(Loaded(Cross().eval(), None, (), inputs, "cross", "callable"))
    return facts_of(raise_program(made))


def test_causal_from_the_end_is_not_causal() -> None:
    """The last query sees every key: causal where there are as many keys as queries, and only
    there.
    """
    facts = attending(
        lambda s, y: torch.ones(*s.shape[-2:], dtype=torch.bool).tril(s.shape[-1] - s.shape[-2]),
        x=torch.randn(2, 7, 8),
        y=torch.randn(2, 11, 8),
    )
    assert (facts.mask, facts.certainty) == (None, "observed")


def test_a_mask_that_reads_the_scores_is_unproved() -> None:
    facts = attending(
        lambda s, y: torch.arange(s.shape[-1])[None] < 1000 + 0 * s[0, 0, :, :1],
        x=torch.randn(2, 8, 8),
        y=torch.randn(3),
    )
    assert (facts.mask, facts.certainty) == (FULL, "observed")
    assert "matmul" in facts.reason


REALS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "long": (lambda m: m.long() != 0, "rounded or cut"),
    "int": (lambda m: m.int() == 1, "rounded or cut"),
    "narrow": (lambda m: m.double().float() != 0, "rounded or cut"),
    "above": (lambda m: (m > 0) | (m >= 1), ""),
}


@pytest.mark.parametrize("name", REALS)
def test_an_input_of_real_numbers_is_no_input_of_whole_ones(name: str) -> None:
    spelling, reason = REALS[name]
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.float64)
    facts = attending(lambda s, y: spelling(y)[:, None, None, :], x=torch.randn(2, 4, 8), y=mask)
    assert reason in facts.reason
    assert facts.certainty == ("observed" if reason else "proved")
    if not reason:
        assert (facts.padding, facts.test.op, facts.test.value) == ("y", "gt", 0)


def test_a_narrower_whole_number_may_be_another() -> None:
    mask = torch.ones(2, 4, dtype=torch.int64)
    facts = attending(
        lambda s, y: (y.to(torch.uint8) != 0)[:, None, None, :], x=torch.randn(2, 4, 8), y=mask
    )
    assert facts.certainty == "observed"
    assert "rounded or cut" in facts.reason


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_positions_that_may_run_over_are_not_proved(dtype: torch.dtype) -> None:
    def compared(m: Masked, x: Tensor, a: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], dtype=dtype)
        return at[None, :] <= at[:, None]

    def summed(m: Masked, x: Tensor, a: Tensor) -> Tensor:
        at = torch.ones(x.shape[1], dtype=torch.int64).cumsum(0, dtype=dtype)
        return at[None, :] <= at[:, None]

    for spelling in (compared, summed):
        facts = facts_of(masked(spelling))
        assert facts.certainty == "observed"
        assert "positions are kept in" in facts.reason


def test_a_lie_in_a_buffer_is_not_causal() -> None:
    facts = facts_of(masked(lambda m, x, a: m.lie[: x.shape[1], : x.shape[1]]))
    assert facts.certainty == "observed"
    assert "band" in facts.reason


def test_two_lowest_numbers_are_not_one() -> None:
    def spelling(m: Masked, x: Tensor, a: Tensor) -> Tensor:
        i, j = ij(x)
        first = torch.zeros(x.shape[1], x.shape[1]).masked_fill(j > i, LOWEST)
        second = torch.zeros(a.shape).masked_fill(a == 0, LOWEST)
        return first + second[:, None, None, :]

    facts = facts_of(masked(spelling))
    assert facts.certainty == "observed"
    assert "two lowest numbers" in facts.reason


def slopes(x: Tensor) -> Tensor:
    i, j = ij(x)
    return torch.tensor([0.5, 0.25])[:, None, None] * (j - i)


def test_tells_alibi_from_other_biases() -> None:
    alibi = facts_of(masked(lambda m, x, a: torch.where(ij(x)[1] <= ij(x)[0], slopes(x), INF)))
    assert (alibi.text, alibi.mask, alibi.bias) == ("causal+alibi", CAUSAL, True)
    unread = masked(lambda m, x, a: m.noise[: x.shape[1], : x.shape[1]])
    assert unread.sites[0].position == "unknown"
    other = facts_of(unread)
    assert (other.text, other.mask, other.bias) == ("tensor", FULL, True)


FAMILIES = {"llama": "causal+padding", "gpt2": "causal+padding", "opt": "causal+padding",
            "bert": "padding", "t5": "padding+relative-bias", "vit": "full"}  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_proves_the_masks_of_model_families(name: str, attention: str) -> None:
    _, program = traced_family(name, attention)
    raised = raise_program(program)
    assert raised.sites
    for site in raised.sites:
        assert (site.mask, site.mask_certainty) == (FAMILIES[name], "proved")
        assert "mask" not in site.missing
