"""The bounds that `check` holds a finished run to, and the measure it holds it to them by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnopt.autotune import check as checking
from attnopt.autotune.accuracy import Accuracy
from attnopt.autotune.baselines import COMPILED, EAGER, Baselines
from attnopt.autotune.cache_entry import CacheEntry
from attnopt.autotune.check import SLACK, Verdict, _same_metric, _speed_bound, check
from attnopt.autotune.data import Data
from attnopt.autotune.result import Result
from attnopt.autotune.timing import Contender, Timing
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
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


def _folder(folder: Path, report: Result) -> Path:
    (folder / "report.json").write_text(json.dumps(report.as_json()))
    return folder


def _checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, Any],
    cache: CacheEntry | None = None, kept: int = 0, **bounds: Any,
) -> Verdict:  # fmt: skip
    """A check in which the forms of the model take these seconds, the optimized one keeps so many
    bytes per token, and nothing else is done."""
    optimized = SimpleNamespace(decoder=SimpleNamespace(bytes_per_token=lambda: kept))
    contenders = tuple(Contender(name, print) for name in (EAGER, COMPILED) if name in seconds)
    loaded = Loaded(torch.nn.Identity(), None, (), {}, "model", "callable")
    for name, answer in {
        "load": loaded, "require_weights": None, "gather": Data(()), "load_folder": optimized,
        "baselines": Baselines(contenders), "compare": Timing(seconds),
    }.items():  # fmt: skip
        monkeypatch.setattr(checking, name, lambda *_, _answer=answer, **__: _answer)
    report = replace(full(), accuracy=None, model_sha256="", cache=cache)
    return check(_folder(folder, report), "model.pt", **bounds)


def test_the_baseline_is_the_one_least_is_gained_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch.compile takes longer by the median, and is gained less over round by round
    seconds = {
        EAGER: (2.0, 6.0, 20.0),
        COMPILED: (1.2, 7.0, 17.0),
        "optimized": (1.0, 4.0, 16.0),
    }
    found = _checked(tmp_path, monkeypatch, seconds, min_speed=1.3)
    assert found.speed == pytest.approx(1.2) and not found.ok


@pytest.mark.parametrize(
    ("bound", "ok", "said"),
    [(0.9, True, ": ok"), (0.98, True, "ok, inconclusive"),
     (1.0, False, "too slow, inconclusive"), (1.2, False, ": too slow")],
)  # fmt: skip
def test_the_median_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: float, ok: bool, said: str
) -> None:
    around = tuple(0.99 + 0.05 * (i % 3 - 1) for i in range(15))
    seconds = {EAGER: around, "optimized": (1.0,) * 15}
    found = _checked(tmp_path, monkeypatch, seconds, min_speed=bound)
    assert found.speed == pytest.approx(0.99) and found.ok is ok and said in found.lines[0]


def test_more_than_the_baseline_takes_what_is_surely_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {EAGER: (0.8, 1.1, 1.3, 0.8, 1.1, 1.3), "optimized": (1.0,) * 6}
    found = _checked(tmp_path, monkeypatch, seconds, min_speed=1.05)
    assert found.speed > 1.05 and not found.ok and "not surely faster" in found.lines[0]


def test_a_metric_needs_no_evaluation_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = Accuracy("mine", 0.0, 0.0, 0.0, bounded=False)
    monkeypatch.setattr(checking, "evaluate", lambda *_, **__: accuracy)
    seconds = {EAGER: (1.0,) * 6, "optimized": (0.5,) * 6}
    found = _checked(tmp_path, monkeypatch, seconds, metric="mine:score", max_drop=0.01)
    assert found.ok and found.drop == 0.0


@pytest.mark.parametrize(
    ("after", "kept", "ok", "said"),
    [
        (30, 40, True, "40 bytes per token, 40.0% of 100 (40.0% allowed): ok"),
        (30, 41, False, "(40.0% allowed): too large"),
        (50, 50, True, "(50.0% allowed): ok"),  # missed then, and not by more now
        (50, 51, False, "(50.0% allowed): too large"),
    ],
)
def test_a_cache_is_held_to_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, kept: int, ok: bool, said: str
) -> None:
    seconds = {EAGER: (1.0,) * 6, "optimized": (0.5,) * 6}
    found = _checked(
        tmp_path, monkeypatch, seconds, min_speed=1.0, cache=CacheEntry(0.4, 100, after), kept=kept
    )
    assert found.ok is ok and found.lines[-1].endswith(said)
    assert found.cache_share == kept / 100 and found.cache_bound == max(0.4, after / 100)
    assert _checked(tmp_path, monkeypatch, seconds, min_speed=1.0).cache_share is None


@pytest.mark.parametrize(
    "bounds",
    [{"min_speed": 0.0}, {"min_speed": -1.0}, {"min_speed": float("nan")}, {"max_drop": -0.01},
     {"max_drop": float("nan")}],
)  # fmt: skip
def test_bounds_that_mean_nothing(tmp_path: Path, bounds: dict[str, float]) -> None:
    with pytest.raises(Problem) as caught:
        check(_folder(tmp_path, full()), "missing.pt", **bounds)  # type: ignore[arg-type]
    assert caught.value.code == "A410" and next(iter(bounds)).replace("_", "-") in caught.value.what


def test_estimates_cannot_be_measured_again(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="a100") as caught:
        check(_folder(tmp_path, replace(full(), target="a100")), "missing.pt")
    assert caught.value.code == "A515" and "measured" in caught.value.why
