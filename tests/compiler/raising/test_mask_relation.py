"""Masks by documents, chunks, given order and prefixes: named as what they are, and lies told from
them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.compiler.contract import Miss, Notes, read_pass
from attnopt.compiler.raising.mask import MaskFacts, classify
from attnopt.compiler.spec import CAUSAL, FULL
from tests.masked_attention import Masked, Spelling, masked


def ij(x: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.arange(x.shape[1])
    return at[:, None], at[None, :]


def same(a: Tensor) -> Tensor:
    return (a[:, :, None] == a[:, None, :])[:, None]


def causal(x: Tensor) -> Tensor:
    return ij(x)[1] <= ij(x)[0]


def packed(m: Masked, x: Tensor, a: Tensor) -> Tensor:
    """Documents counted by where the positions jump; causal by these positions."""
    jumps = torch.diff(a, prepend=a[:, :1] - 1, dim=-1) != 1
    return same(jumps.cumsum(-1)) & (a[:, :, None] >= a[:, None, :])[:, None]


def chunks(m: Masked, x: Tensor, a: Tensor) -> Tensor:
    i, j = ij(x)
    return (i // 4 == j // 4) & (j <= i)


def facts_of(spelling: Spelling) -> MaskFacts:
    program = masked(spelling)
    return classify(program, program.attentions()[0])


@pytest.mark.parametrize(
    ("spelling", "text"),
    [
        (lambda m, x, a: same(a), "document(attention_mask)"),
        (lambda m, x, a: same(a) & causal(x), "causal+document(attention_mask)"),
        (lambda m, x, a: ~(~same(a) | ~causal(x)), "causal+document(attention_mask)"),
        (packed, "document(cumsum)+order(attention_mask)"),
        (chunks, "causal+chunk(4)"),
        (lambda m, x, a: (ij(x)[0].div(4, rounding_mode="floor") == ij(x)[1] // 4), "chunk(4)"),
        (lambda m, x, a: causal(x) | (ij(x)[1] < 3), "prefix(3)"),
        (lambda m, x, a: causal(x)[None, None] | (a == 1)[:, None, None, :],
         "prefix(attention_mask)"),
    ],
)  # fmt: skip
def test_names_what_is_proved(spelling: Spelling, text: str) -> None:
    facts = facts_of(spelling)
    assert (facts.certainty, facts.reason) == ("proved", "")
    assert facts.text == text


def test_what_is_kept_beside_the_relation() -> None:
    assert facts_of(chunks).mask == CAUSAL
    assert facts_of(lambda m, x, a: same(a)).mask == FULL


def test_such_a_mask_stays_a_tensor() -> None:
    program = masked(chunks)
    answer = read_pass("simplify_mask{}").rewrite(program.sites[0], program, Notes(program))
    assert isinstance(answer, Miss)
    assert "causal+chunk(4), which stays a tensor" in answer.reason


@pytest.mark.parametrize(
    "spelling",
    [
        lambda m, x, a: (ij(x)[0] // 4 == (ij(x)[1] + 1) // 4) & causal(x),
        lambda m, x, a: (ij(x)[0] // 4 == ij(x)[1] // 5) & causal(x),
        lambda m, x, a: (a[:, :, None] == a[:, None, :] + 1)[:, None],
        lambda m, x, a: (a[:, :, None] == a.flip(1)[:, None, :])[:, None],
        lambda m, x, a: same(a) | (ij(x)[0] == 3),
        lambda m, x, a: same(a[:1].expand(len(a), -1)),
        lambda m, x, a: (ij(x)[0] + 1) // 4 == (ij(x)[1] + 1) // 4,
        lambda m, x, a: causal(x) & ((ij(x)[0] // 4 == ij(x)[1] // 4)
                                     | ((ij(x)[0] + 1) // 4 == (ij(x)[1] + 1) // 4)),
        lambda m, x, a: causal(x)[None, None] | (a == 1)[:, None, :, None],
        lambda m, x, a: causal(x) | ((ij(x)[1] < 3) & (ij(x)[0] > 0)),
    ],
)  # fmt: skip
def test_what_is_almost_such_a_mask_is_not_proved_to_be_one(spelling: Spelling) -> None:
    facts = facts_of(spelling)
    assert not facts.relations
    assert facts.mask is None or facts.certainty == "observed"
    assert not (facts.certainty == "proved" and facts.text.startswith(("prefix", "document")))
