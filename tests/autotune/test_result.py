"""A result reads back equal, keeps to its published schema, and says what does not fit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from attnopt.autotune import record
from attnopt.autotune.accuracy import Accuracy
from attnopt.autotune.result import AccuracyEntry, Number, Result, Speed, Timed, Trial
from attnopt.autotune.timing import Timing
from attnopt.compiler.errors import Problem
from tests.autotune.results import NASTY, full, least
from tests.tree import ROOT

SCHEMA = ROOT / "docs" / "report.schema.json"


@pytest.mark.parametrize("result", [least(), full(), full(NASTY, met=True)])
def test_a_result_reads_back_equal(result: Result) -> None:
    text = json.dumps(result.as_json(), allow_nan=False)
    assert Result.from_json(json.loads(text)) == result


def test_numbers_that_are_not_finite_stay_valid_json() -> None:
    bad = Trial(0, "p", False, Number(math.inf, "measured"), Number(-math.inf, "measured"))
    text = json.dumps(replace(least(), trials=(bad,)).as_json(), allow_nan=False)
    assert Result.from_json(json.loads(text)).trials == (bad,)
    nan = record.read(Number, record.dump(Number(math.nan, "estimated")))
    assert math.isnan(nan.value)


def test_the_published_schema_is_the_one_of_the_classes() -> None:
    """To mend: write `record.schema(Result)` to docs/report.schema.json, and raise SCHEMA."""
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == record.schema(Result)


@pytest.mark.parametrize("result", [least(), full(), full(NASTY, met=True)])
def test_reports_keep_to_the_schema(result: Result) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    data = json.loads(result.files()["report.json"])
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(data)


def _spoiled(**changes: Any) -> dict[str, Any]:
    return {**full().as_json(), **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": 3},
        {"seed": True},
        {"met": "yes"},
        {"max_drop": "much"},
        {"surprise": 1},
        {"baselines": [{"name": "eager"}]},
        {"speed": {"over": {}, "best": "eager", "verdict": "great", "ratio": None}},
    ],
)
def test_the_schema_refuses_what_does_not_fit(changes: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert not validator.is_valid(_spoiled(**changes))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"model": 3}, "`model` is int, not str"),
        ({"seed": True}, "`seed` is bool, not int"),
        ({"max_drop": "much"}, "`max_drop` is 'much', not a number"),
        ({"baselines": [{"name": "eager"}]}, "`baselines[0].status` is missing"),
        ({"trials": {}}, "`trials` is dict, not list"),
        ({"baselines": [{"name": "x", "status": "guessed"}]}, "`baselines[0].status` is 'guessed'"),
    ],
)
def test_reading_names_the_field_that_does_not_fit(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(Problem) as told:
        Result.from_json(_spoiled(**changes))
    assert told.value.code == "A504" and told.value.why == where


def test_another_schema_is_refused() -> None:
    with pytest.raises(Problem, match="schema 99 is not known"):
        Result.from_json(_spoiled(schema=99))


def test_the_exit_code_follows_from_met() -> None:
    assert (full(met=True).exit_code, full(met=False).exit_code) == (0, 2)
    assert full().as_json()["exit_code"] == 2


def test_timings_become_numbers() -> None:
    timing = Timing({"eager": (2.0, 2.2, 1.8, 2.0, 2.1), "new": (1.0, 1.1, 0.9, 1.0, 1.05)})
    timed = Timed.of(timing, "eager")
    assert timed.seconds is not None and timed.seconds.value == 2.0 and timed.rounds == 5
    assert timed.seconds.low == 2.0 and timed.seconds.high == 2.1
    speed = Speed.of({"eager": timing.ratio("new", "eager")})
    assert speed.ratio.value == pytest.approx(2.0) and speed.ratio.kind == "measured"
    assert speed.verdict == "faster"
    assert speed.ratio.low is not None and speed.ratio.low > 1.5


def test_evaluations_become_entries() -> None:
    entry = AccuracyEntry.of(
        Accuracy("causal-lm", 0.004, 0.003, 0.005, perplexity=3.2, perplexity_original=3.1,
                 kl=0.002, kl_upper=0.003, top1=0.99, top1_lower=0.985, sequences=50, tokens=900),
        0.01,
        exact=False,
    )  # fmt: skip
    assert (entry.metric, entry.verdict) == ("perplexity", "pass")
    assert entry.original is not None and entry.original.value == 3.1
    assert (entry.drop.low, entry.drop.high, entry.bound) == (0.003, 0.005, 0.01)
    assert set(entry.also) == {"KL divergence", "top-1 agreement"}
    infeasible = Accuracy("causal-lm", math.inf, -math.inf, math.inf, False, "NaN in the outputs")
    told = AccuracyEntry.of(infeasible, 0.01, exact=False)
    assert told.verdict == "fail" and told.reason == "NaN in the outputs"
    metric = AccuracyEntry.of(Accuracy("mine", 0.1, 0.1, 0.1, bounded=False, metric=0.8,
                                       metric_original=0.9), 0.2, exact=False)  # fmt: skip
    assert metric.metric == "mine" and metric.drop.low is None and metric.tier == ""


def test_only_exact_rewrites_are_of_the_tier_exact() -> None:
    nothing = Accuracy("encoder", 0.0, 0.0, 0.0, worst=0.0, cosine=1.0, cosine_lower=1.0)
    assert AccuracyEntry.of(nothing, 0.01, exact=True).tier == "exact"
    assert AccuracyEntry.of(nothing, 0.01, exact=False).tier == "near-lossless"


def test_the_evidence_of_a_plan_is_plain_json() -> None:
    evidence = full().evidence()
    json.dumps(evidence, allow_nan=False)
    assert evidence["speed"]["ratio"]["kind"] == "measured"
