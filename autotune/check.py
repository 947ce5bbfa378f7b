"""Measuring a saved run again: its speed, its accuracy and its cache against their bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnopt.autotune import wording
from attnopt.autotune.accuracy import evaluate
from attnopt.autotune.baselines import baselines
from attnopt.autotune.cache_entry import CacheEntry, most_bytes
from attnopt.autotune.data import gather
from attnopt.autotune.environment import environment
from attnopt.autotune.place import Place, at_home, original, read_at_home
from attnopt.autotune.replay import report_of, same_model
from attnopt.autotune.request import Wanted
from attnopt.autotune.result import Result, Speed
from attnopt.autotune.timing import Contender, compare
from attnopt.compiler.artifact import load as load_folder
from attnopt.compiler.device import Carried, usable
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import require_weights
from attnopt.compiler.intake.source import load
from attnopt.compiler.optimized import Optimized

Progress = Callable[[str, float], None]
# Of the speed ratio a check may lose before it says slower: machines differ from day to day.
SLACK = 0.10


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    `ok` when speed, accuracy and, of a run under a budget of cache bytes, the share of these that
    the folder's decoder keeps are within their bounds; `lines` say it figure by figure.
    """

    ok: bool
    speed: float
    speed_low: float
    speed_bound: float
    drop: float | None
    drop_upper: float | None
    drop_bound: float
    lines: tuple[str, ...]
    environment: dict[str, Any]
    cache_share: float | None = None
    cache_bound: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The verdict as a JSON object; every figure in it is measured."""
        return {**asdict(self), "evidence": "measured"}


def check(
    folder: str | Path,
    model: str | Path,
    *,
    min_speed: float | None = None,
    max_drop: float | None = None,
    metric: str | None = None,
    text: str | Path | None = None,
    calibration: str | Path | None = None,
    inputs: str | Path | None = None,
    batch: int | None = None,
    length: int | None = None,
    allow_globals: tuple[str, ...] = (),
    trust: bool = False,
    attention: str | None = None,
    dtype: str | None = None,
    seconds: float = 8.0,
    progress: Progress | None = None,
) -> Verdict:
    """Measure a saved folder against its model again.

    The speed bound is `min_speed`, or the budget of the report where it was met, or its ratio less
    a tenth; the accuracy bound `max_drop` or the report's. The median decides, as in `optimize`.
    Raises `Problem` A410 for bounds that mean nothing, A505 when there is no readable report, A513
    when the model is not the one the folder was made from, A514 when the run was judged by a metric
    of the user's and none is given, A515 when its figures are estimates, and A411 when they are of
    a device that cannot be used here.
    """
    say = progress or (lambda what, share: None)
    _require_bounds(min_speed, max_drop)
    home = Path(folder)
    report = report_of(home)
    _require_measured(report, home)
    there = Carried(usable(report.device))
    _require_the_same(report, home)
    same_model(report, Path(model))
    _same_metric(report, metric)
    wanted = Wanted(_path(text), _path(calibration), _path(inputs), batch, length)
    loaded = load(
        str(model), inputs=wanted.inputs, text=wanted.text, allow_globals=allow_globals,
        trust=trust, attention=attention, dtype=dtype,
    )  # fmt: skip
    require_weights(loaded)
    with at_home(loaded.module):
        loaded = read_at_home(loaded)
        data = gather(loaded, wanted, str(model)).to(there.device)
        given, optimized = original(loaded, there), load_folder(home, there.device)
        base = baselines(given, data.timing)
        timing = compare(
            [*base.contenders, Contender("optimized", optimized)],
            data.timing,
            seconds=seconds,
            progress=say,
        )
        speed = Speed.of(
            {c.name: timing.ratio("optimized", c.name, report.seed) for c in base.contenders}
        )
        bound = _speed_bound(report) if min_speed is None else min_speed
        fast, line = _judged(speed, bound)
        lines = [line]
        allowed = report.max_drop if max_drop is None else max_drop
        drop = upper = None
        close = True
        if data.evaluation or metric is not None:
            accuracy = evaluate(
                given, optimized, data.evaluation, loaded.task, say, metric=metric, seed=report.seed
            )
            drop, upper = accuracy.drop, accuracy.drop_upper
            verdict = accuracy.verdict(allowed)
            close = verdict == "pass"
            lines.append(f"drop {drop:.2%}, at most {upper:.2%} ({allowed:.2%} allowed): {verdict}")
        else:
            close = report.accuracy is None and max_drop is None
            lines.append(
                "drop not measured: there is no evaluation data; give --text FILE or --inputs FILE"
            )
        small, share, share_bound = True, None, None
        if report.cache is not None:
            small, share, share_bound, line = _cache(report.cache, optimized)
            lines.append(line)
        return Verdict(
            fast and close and small,
            speed.ratio.value,
            speed.ratio.value if speed.ratio.low is None else speed.ratio.low,
            bound,
            drop,
            upper,
            allowed,
            tuple(lines),
            environment(),
            share,
            share_bound,
        )


def _cache(entry: CacheEntry, optimized: Optimized) -> tuple[bool, float, float, str]:
    """Whether a folder's decoder keeps no more bytes than its run was asked for, or where that was
    missed, than it had; the share that it keeps, the bound, and all that in words."""
    kept, bound = optimized.decoder.bytes_per_token(), entry.wanted if entry.met else entry.share
    small, share = kept <= most_bytes(bound, entry.before), kept / entry.before
    line = f"cache {kept:,} bytes per token, {share:.1%} of {entry.before:,} ({bound:.1%} allowed)"
    return small, share, bound, f"{line}: {'ok' if small else 'too large'}"


def _speed_bound(report: Result) -> float:
    """The least ratio that a run has to keep: its budget if it met that, else its ratio less a
    tenth."""
    if report.budget and report.met:
        return report.budget
    return report.speed.ratio.value * (1 - SLACK) if report.speed else 1.0


def _judged(speed: Speed, bound: float) -> tuple[bool, str]:
    """Whether a speed keeps its bound, and that in words."""
    fast = speed.reaches(bound)
    told = "ok" if fast else "too slow" if speed.ratio.value < bound else "not surely faster"
    if speed.straddles(bound):
        told += ", inconclusive"
    return fast, f"speed {wording.times(speed.ratio)}, at least {bound:.2f}× wanted: {told}"


def _require_bounds(min_speed: float | None, max_drop: float | None) -> None:
    if min_speed is not None and not (math.isfinite(min_speed) and min_speed > 0):
        raise Problem(
            "A410", f"--min-speed has to be more than 0, not {min_speed:g}",
            help="it is how many times as fast the result has to be, e.g. --min-speed 1.8x",
        )  # fmt: skip
    if max_drop is not None and not (math.isfinite(max_drop) and max_drop >= 0):
        raise Problem(
            "A410", f"--max-drop has to be at least 0, not {max_drop:g}",
            help="give a percentage, e.g. --max-drop 1%, or 0 for no loss at all",
        )  # fmt: skip


def _require_measured(report: Result, home: Path) -> None:
    timed = report.speed is not None and report.speed.ratio.kind == "measured"
    if report.target != "cpu" and not (timed and report.device != "cpu"):
        raise Problem(
            "A515", f"the figures of this run are estimates for {report.target}",
            where=str(home), why="nothing was measured, so nothing can be measured again here",
            help="run optimize without --target for figures of this machine",
        )  # fmt: skip


def _require_the_same(report: Result, home: Path) -> None:
    here = Place.of(report.device, None).target
    if here != report.target:
        raise Problem(
            "A515", f"the figures of this run are of {report.target}, this machine has {here}",
            where=str(home), why="ratios of one GPU are no bounds for another",
            help="check it on the GPU of the run, or run optimize here",
        )  # fmt: skip


def _same_metric(report: Result, metric: str | None) -> None:
    used = report.accuracy.metric if report.accuracy else ""
    if metric is None and ":" in used:
        raise Problem(
            "A514", f"the accuracy of this run was measured by `{used}`",
            why="no code that a report names is run unasked",
            help=f"give --metric {used}",
        )  # fmt: skip


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)
