"""The bounds that `check` holds a finished run to, and the measure it holds it to them by."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attnopt.autotune.replay import SLACK, _same_metric, _speed_bound
from attnopt.compiler.errors import Problem
from tests.autotune.results import full


def test_a_budget_that_was_missed_is_no_bound() -> None:
    result = full()
    assert result.speed is not None and result.budget is not None
    assert _speed_bound(replace(result, met=True)) == result.budget
    kept = result.speed.ratio.value * (1 - SLACK)
    assert _speed_bound(replace(result, met=False)) == pytest.approx(kept)


def test_a_run_judged_by_a_metric_asks_for_it() -> None:
    result = full()
    assert result.accuracy is not None
    _same_metric(result, None)
    judged = replace(result, accuracy=replace(result.accuracy, metric="mine.scores:recall"))
    _same_metric(judged, "mine.scores:recall")
    with pytest.raises(Problem, match="mine") as caught:
        _same_metric(judged, None)
    assert caught.value.code == "A514"
