"""Accuracy against torch's own losses and constructed cases: masks, bounds, tiers, NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.autotune.accuracy import Accuracy, evaluate, load_metric, tier
from attnopt.autotune.teacher import Teacher
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Batch

VOCABULARY = 17
LANGUAGE, ENCODER = "causal-lm", "encoder"


class Bigram:
    """A language model that is a table of logits; `tilt` mixes another one in; counts calls."""

    def __init__(self, tilt: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        source = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=source)
        self.table += tilt * torch.randn(VOCABULARY, VOCABULARY, generator=source)
        self.table, self.calls = self.table.to(dtype), 0

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        self.calls += 1
        return {"logits": self.table[input_ids]}


def text(count: int = 12, length: int = 9, padded: bool = False, seed: int = 1) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count // 2):
        ids = torch.randint(0, VOCABULARY, (2, length), generator=source)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, length // 2 :] = 0
        made.append(Batch((), {"input_ids": ids, "attention_mask": mask}, mask.bool()))
    return made


def by_hand(model: Bigram, batches: list[Batch]) -> tuple[float, int]:
    """Perplexity by torch's cross_entropy with ignored labels, and the number of tokens."""
    logits, labels = [], []
    for batch in batches:
        ids, mask = batch.kwargs["input_ids"], batch.kwargs["attention_mask"].bool()
        keep = mask[:, 1:] & mask[:, :-1]
        logits.append(model.table.double()[ids][:, :-1].flatten(0, 1))
        labels.append(torch.where(keep, ids[:, 1:], -100).flatten())
    loss = F.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=-100)
    return math.exp(loss.item()), int((torch.cat(labels) >= 0).sum())


@pytest.mark.parametrize("padded", [False, True])
def test_perplexity_is_that_of_cross_entropy(padded: bool) -> None:
    batches, candidate = text(padded=padded), Bigram(0.3)
    got = evaluate(Bigram(), candidate, batches, LANGUAGE)
    old, tokens = by_hand(Bigram(), batches)
    new, _ = by_hand(candidate, batches)
    assert got.perplexity_original == pytest.approx(old, rel=1e-5)
    assert got.perplexity == pytest.approx(new, rel=1e-5)
    assert got.drop == pytest.approx(new / old - 1, rel=1e-4)
    assert (got.tokens, got.sequences, got.evidence) == (tokens, 12, "measured")
    assert got.drop_lower <= got.drop <= got.drop_upper


def test_kl_and_top1_are_those_of_the_tables() -> None:
    batches, old, new = text(), Bigram(), Bigram(0.5)
    got = evaluate(old, new, batches, LANGUAGE)
    p, q = old.table.double().log_softmax(-1), new.table.double().log_softmax(-1)
    seen = torch.cat([batch.kwargs["input_ids"][:, :-1].flatten() for batch in batches])
    kl = F.kl_div(q[seen], p[seen], log_target=True, reduction="batchmean")
    assert got.kl == pytest.approx(kl.item(), abs=1e-5)
    assert got.top1 == pytest.approx(
        (p[seen].argmax(-1) == q[seen].argmax(-1)).double().mean().item()
    )


def test_what_stands_in_padding_changes_nothing() -> None:
    batches = text(padded=True)
    other = text(padded=True)
    for batch in other:
        batch.kwargs["input_ids"][batch.kwargs["attention_mask"] == 0] = 3

    def noisy(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        made = Bigram(0.3)(input_ids)["logits"]
        return {"logits": made.masked_fill(attention_mask[..., None] == 0, float("nan"))}

    first = evaluate(Bigram(), Bigram(0.3), batches, LANGUAGE)
    assert evaluate(Bigram(), noisy, other, LANGUAGE) == first


def test_the_same_model_is_exact_even_on_one_sequence() -> None:
    got = evaluate(Bigram(), Bigram(), text(count=2)[:1], LANGUAGE)
    assert got.drop == 0.0 and got.top1 == 1.0 and got.kl == pytest.approx(0.0, abs=1e-5)
    assert got.verdict(0.0) == "pass"
    few = Batch((), {"input_ids": torch.tensor([[1, 2, 3]])})
    assert evaluate(Bigram(), Bigram(), [few], LANGUAGE).verdict(0.0) == "pass"
    assert evaluate(Bigram(), Bigram(0.01), [few], LANGUAGE).verdict(0.5) == "inconclusive"


def test_the_original_runs_once_for_many_candidates() -> None:
    original, batches = Bigram(), text()
    teacher = Teacher(original, batches, LANGUAGE)
    first = evaluate(teacher, Bigram(0.1), (), LANGUAGE)
    second = evaluate(teacher, Bigram(0.1), (), LANGUAGE)
    assert original.calls == teacher.forwards == len(batches)
    assert first == second


def test_without_memory_the_original_runs_again_and_says_the_same() -> None:
    original, batches = Bigram(), text()
    bare = Teacher(original, batches, LANGUAGE, cache_bytes=0)
    for _ in range(2):
        got = evaluate(bare, Bigram(0.1), (), LANGUAGE)
    assert original.calls == 2 * len(batches)
    assert got == evaluate(Bigram(), Bigram(0.1), batches, LANGUAGE)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda logits: logits * float("nan"), "not finite"),
        (lambda logits: logits.masked_fill(logits > -9, float("-inf")), "not finite"),
        (lambda logits: logits[..., :5], "another shape"),
        (lambda logits: logits[:, :-1], "another shape"),
    ],
)
def test_a_broken_candidate_is_infeasible_and_never_best(
    broken: Callable[[Tensor], Tensor], said: str
) -> None:
    got = evaluate(
        Bigram(), lambda **k: {"logits": broken(Bigram()(**k)["logits"])}, text(), LANGUAGE
    )
    assert not got.feasible and said in got.reason
    assert got.drop == math.inf and got.tier == "experimental" and got.verdict(9.9) == "fail"
    assert json.loads(json.dumps(got.as_json(), allow_nan=False))["drop"] is None
    assert not Accuracy.from_json(got.as_json()).feasible


def test_an_original_that_is_nan_is_the_users_problem() -> None:
    model = Bigram()
    model.table[:] = float("nan")
    with pytest.raises(Problem) as caught:
        evaluate(model, Bigram(), text(), LANGUAGE)
    assert caught.value.code == "A402"


@pytest.mark.parametrize("batches", [[], [Batch((), {"input_ids": torch.tensor([[1]])})]])
def test_nothing_to_measure_on_is_said(batches: list[Batch]) -> None:
    with pytest.raises(Problem) as caught:
        evaluate(Bigram(), Bigram(), batches, LANGUAGE)
    assert caught.value.code == "A406"


@pytest.mark.parametrize(
    ("drop", "kl", "top1", "expected"),
    [
        (0.009, 0.009, 0.981, "near-lossless"),
        (0.011, 0.009, 0.981, "fast"),
        (0.009, 0.011, 0.981, "fast"),
        (0.009, 0.009, 0.979, "fast"),
        (0.029, 0.029, 0.951, "fast"),
        (0.031, 0.001, 0.999, "experimental"),
        (0.001, 0.031, 0.999, "experimental"),
        (0.001, 0.001, 0.949, "experimental"),
        (1e-9, 1e-9, 1.0, "exact"),
    ],
)
def test_tiers_by_the_bounds(drop: float, kl: float, top1: float, expected: str) -> None:
    made = Accuracy(LANGUAGE, drop / 2, 0.0, drop, rounding=1e-6, kl=kl / 2, kl_upper=kl,
                    top1=1.0, top1_lower=top1, sequences=20)  # fmt: skip
    assert tier(made) == made.tier == expected


def test_three_verdicts() -> None:
    def made(lower: float, upper: float, sequences: int = 20) -> Accuracy:
        return Accuracy(LANGUAGE, 0.01, lower, upper, sequences=sequences)

    assert made(0.0, 0.009).verdict(0.01) == "pass"
    assert made(0.011, 0.02).verdict(0.01) == "fail"
    assert made(0.0, 0.02).verdict(0.01) == "inconclusive"
    assert made(0.0, 0.009, sequences=3).verdict(0.01) == "inconclusive"


def test_the_upper_bound_covers_the_true_drop() -> None:
    """With the true drop known from all the data, bounds of samples hold about 95% of the time."""
    truth = evaluate(Bigram(), Bigram(0.2), text(count=4000, seed=7), LANGUAGE).drop
    held = 0
    for seed in range(60):
        got = evaluate(Bigram(), Bigram(0.2), text(count=16, seed=100 + seed), LANGUAGE, seed=seed)
        held += got.drop_upper >= truth
    assert held >= 51  # at a true 95% fewer than 51 of 60 happen once in 800


def _encode(scale: float = 0.0, padding: float = 0.0) -> Callable[..., Any]:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    other = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))

    def run(x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        states = x @ (weight + scale * other)
        states = torch.where(attention_mask[..., None] > 0, states, padding)
        return {"last_hidden_state": states, "pooled": states[:, 0]}

    return run


def encoder_batches() -> list[Batch]:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    source = torch.Generator().manual_seed(2)
    return [
        Batch((), {"x": torch.randn(3, 3, 4, generator=source), "attention_mask": mask})
        for _ in range(4)
    ]


def test_cosine_is_per_sample_over_real_tokens_and_the_worst_output() -> None:
    batches = encoder_batches()
    got = evaluate(_encode(), _encode(0.3, padding=100.0), batches, ENCODER)
    expected = []
    for batch in batches:
        a, b = _encode()(**batch.kwargs), _encode(0.3)(**batch.kwargs)
        for row in range(3):
            each = [F.cosine_similarity(a[n][row].flatten(), b[n][row].flatten(), dim=0) for n in a]
            expected.append(min(each).item())
    assert got.per_sequence["cosine"] == pytest.approx(expected, abs=1e-5)
    assert got.drop == pytest.approx(1 - float(np.mean(expected)), abs=1e-6)
    assert got.sequences == 12 and got.tokens == 24
    assert got.cosine_lower is not None and got.cosine_lower < 1 - got.drop < 1


def test_rounding_of_an_encoder_is_exact_and_an_error_is_not() -> None:
    batches = encoder_batches()
    assert evaluate(_encode(), _encode(1e-6), batches, ENCODER).tier == "exact"
    assert evaluate(_encode(), _encode(1e-2), batches, ENCODER).tier == "near-lossless"
    assert evaluate(_encode(), _encode(3.0), batches, ENCODER).tier == "experimental"


def test_an_encoder_with_nan_or_other_shapes_is_infeasible() -> None:
    batches = encoder_batches()
    nan = evaluate(_encode(), _encode(float("nan")), batches, ENCODER)
    assert not nan.feasible and "not finite" in nan.reason
    less = evaluate(_encode(), lambda **k: {"pooled": _encode()(**k)["pooled"]}, batches, ENCODER)
    assert not less.feasible and "shapes" in less.reason


def score(model: Any) -> float:
    """A metric for these tests: the sum of the model's table."""
    return float(model.table.double().abs().sum())


def test_a_metric_of_the_user_is_a_relative_fall() -> None:
    worse = Bigram()
    worse.table = worse.table * 0.9
    got = evaluate(Bigram(), worse, [], LANGUAGE, metric=score)
    assert got.drop == pytest.approx(0.1, rel=1e-5) and not got.bounded
    assert got.verdict(0.2) == "pass" and got.verdict(0.05) == "fail"
    worse.table = worse.table * float("nan")
    assert not evaluate(Bigram(), worse, [], LANGUAGE, metric=score).feasible


def test_a_metric_that_is_zero_for_the_original_cannot_fall() -> None:
    with pytest.raises(Problem, match=r"is 0\.0"):
        evaluate(Bigram(), Bigram(), [], LANGUAGE, metric=lambda model: 0.0)


def test_a_metric_by_name() -> None:
    assert load_metric("math:isfinite") is math.isfinite
    for text_ in ("math", "math:nothing", "no_such_module:f", "math:pi"):
        with pytest.raises(Problem) as caught:
            load_metric(text_)
        assert caught.value.code == "A407"


def test_json_round_trip() -> None:
    got = evaluate(Bigram(), Bigram(0.3), text(), LANGUAGE)
    again = Accuracy.from_json(json.loads(json.dumps(got.as_json(), allow_nan=False)))
    assert again == got and got.as_json()["tier"] == got.tier
