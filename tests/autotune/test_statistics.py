"""Intervals against known answers: quantiles from tables, coverage counted on planted data."""

from __future__ import annotations

import math

import numpy as np
import pytest

from attnopt.autotune import statistics


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [
        (0.95, 1, 6.3138),
        (0.975, 2, 4.3027),
        (0.95, 7, 1.8946),
        (0.975, 10, 2.2281),
        (0.05, 30, -1.6973),
    ],
)
def test_student_quantiles_match_the_tables(
    probability: float, freedom: int, expected: float
) -> None:
    assert statistics.student_quantile(probability, freedom) == pytest.approx(expected, abs=1e-4)


def test_the_spread_of_known_numbers() -> None:
    got = statistics.spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (got.median, got.q1, got.q3, got.min, got.max, got.count) == (3, 2, 4, 1, 5, 5)
    assert got.iqr == 2


def test_small_samples_have_wider_tails_than_asked() -> None:
    assert statistics.tail(0.025, 8) < 0.015
    assert statistics.tail(0.025, 5000) == pytest.approx(0.025, rel=0.01)


@pytest.mark.parametrize("count", [10, 40])
def test_the_upper_bound_of_a_mean_covers_as_often_as_it_says(count: int) -> None:
    random = np.random.default_rng(3)
    runs = 300
    held = 0
    for run in range(runs):
        rows = random.normal(2.0, 1.0, count)
        held += statistics.bootstrap(rows, statistics.mean_of, seed=run, resamples=400).above >= 2.0
    assert 0.91 <= held / runs <= 0.985  # 0.95 give or take three standard errors of 300 runs


def test_the_interval_of_a_median_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    runs = 300
    held = 0
    for run in range(runs):
        rows = random.exponential(1.0, 15)
        got = statistics.bootstrap(rows, statistics.median_of, seed=run, resamples=400)
        held += got.low <= math.log(2.0) <= got.high
    assert held / runs >= 0.91


def test_the_same_seed_gives_the_same_interval_and_another_one_another() -> None:
    rows = np.random.default_rng(0).normal(size=20)
    first = statistics.bootstrap(rows, statistics.mean_of, seed=1)
    assert first == statistics.bootstrap(rows, statistics.mean_of, seed=1)
    assert first != statistics.bootstrap(rows, statistics.mean_of, seed=2)


def test_rows_stay_paired() -> None:
    base = np.random.default_rng(0).normal(size=50) * 100
    pairs = np.stack([base, base + 1.0], -1)

    def difference(rows: statistics.Array) -> statistics.Array:
        return np.asarray(rows[..., 1].mean(-1) - rows[..., 0].mean(-1))

    got = statistics.bootstrap(pairs, difference)
    assert got.low == pytest.approx(1.0) and got.high == pytest.approx(1.0)


def test_one_row_bounds_nothing() -> None:
    got = statistics.bootstrap([3.0], statistics.mean_of)
    assert got.value == 3.0 and got.above == math.inf and got.low == -math.inf


def test_a_value_that_is_not_finite_bounds_nothing() -> None:
    got = statistics.bootstrap([1.0, math.nan, 2.0], statistics.mean_of)
    assert math.isnan(got.value) and got.above == math.inf


def test_no_rows_is_a_bug() -> None:
    with pytest.raises(ValueError, match="at least one"):
        statistics.spread([])
