"""How sure a measured number is: medians, spreads and bootstrap intervals, fixed by the seed.

Intervals are percentile bootstraps whose tails are widened for small samples: with n rows the tail
probability a becomes Phi(sqrt(n / (n - 1)) * t), t the a-quantile of Student's t with n - 1 degrees
of freedom (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
LEVEL = 0.95
RESAMPLES = 2000
_CELLS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided interval and one-sided bounds, all at the same `level`.

    `low` to `high` is the two-sided interval; `below` is the one-sided lower bound (the true value
    is above it with probability `level`) and `above` the one-sided upper one.
    """

    value: float
    low: float
    high: float
    below: float
    above: float
    level: float = LEVEL

    @property
    def width(self) -> float:
        """Length of the two-sided interval."""
        return self.high - self.low

    def as_json(self) -> dict[str, float]:
        """The interval as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Spread:
    """Five numbers that sum up a sample, in the sample's unit."""

    median: float
    q1: float
    q3: float
    min: float
    max: float
    count: int

    @property
    def iqr(self) -> float:
        """The middle half: third minus first quartile."""
        return self.q3 - self.q1

    def as_json(self) -> dict[str, float]:
        """The spread as a JSON object."""
        return {**asdict(self), "iqr": self.iqr}


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles and extremes of a sample that is not empty."""
    low, q1, median, q3, high = np.quantile(_rows(values), (0, 0.25, 0.5, 0.75, 1)).tolist()
    return Spread(median, q1, q3, low, high, len(values))


def bootstrap(
    rows: ArrayLike,
    statistic: Statistic,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The interval of a statistic over rows that are drawn again with replacement.

    `rows` is `[n]` or `[n, columns]`, one row per independent unit; a row's columns stay together,
    which is what makes a comparison paired. `statistic` maps `[..., n(, columns)]` to `[...]`.
    One row alone, or a statistic that is not finite, has an interval of plus or minus infinity.
    """
    table = _rows(rows)
    value = float(statistic(table[None])[0])
    count = len(table)
    if not math.isfinite(value) or count < 2:
        return Interval(value, -math.inf, math.inf, -math.inf, math.inf, level)
    drawn = np.concatenate(list(_draws(table, statistic, resamples, seed)))
    drawn = np.where(np.isnan(drawn), np.inf, drawn)
    two, one = tail((1 - level) / 2, count), tail(1 - level, count)
    low, high, below, above = (
        float(q) for q in np.quantile(drawn, (two, 1 - two, one, 1 - one), method="inverted_cdf")
    )
    return Interval(value, low, high, below, above, level)


def median_of(rows: Array) -> Array:
    """The median over the last axis, as a statistic for `bootstrap`."""
    return np.asarray(np.median(rows, axis=-1), dtype=np.float64)


def mean_of(rows: Array) -> Array:
    """The mean over the last axis, as a statistic for `bootstrap`."""
    return np.asarray(rows.mean(axis=-1), dtype=np.float64)


@lru_cache(maxsize=256)
def tail(probability: float, count: int) -> float:
    """The tail of the percentile bootstrap that covers `probability` with `count` rows."""
    normal = NormalDist()
    return normal.cdf(math.sqrt(count / (count - 1)) * student_quantile(probability, count - 1))


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t with a whole number of degrees of freedom, by bisection."""
    low, high = -1e4, 1e4
    while high - low > 1e-9 * max(1.0, abs(low)):
        middle = (low + high) / 2
        below = student_cdf(middle, freedom) < probability
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def student_cdf(t: float, freedom: int) -> float:
    """Student's t distribution (finite series: Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for step in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (step - 1) / step
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2


def _draws(table: Array, statistic: Statistic, resamples: int, seed: int) -> Iterator[Array]:
    """The statistic of each resample, a few resamples at a time so that memory stays bounded."""
    random = np.random.default_rng(seed)
    count = len(table)
    chunk = max(1, min(resamples, _CELLS // max(1, table.size)))
    for start in range(0, resamples, chunk):
        picked = random.integers(0, count, (min(chunk, resamples - start), count))
        yield statistic(table[picked])


def _rows(values: ArrayLike) -> Array:
    table = np.asarray(values, dtype=np.float64)
    if not len(table):
        raise ValueError("a statistic needs at least one value")
    return table
