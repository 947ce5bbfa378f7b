"""Replaying a saved run: `apply` rebuilds the model of a plan without searching, `check` measures a
folder again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attnopt.autotune.accuracy import evaluate
from attnopt.autotune.baselines import baselines
from attnopt.autotune.data import gather
from attnopt.autotune.environment import environment
from attnopt.autotune.optimize import original, require_sites
from attnopt.autotune.request import Wanted
from attnopt.autotune.result import Result
from attnopt.autotune.timing import Contender, compare
from attnopt.compiler.artifact import (
    check_writable,
    load_calibration,
    read_plan,
    save,
    source_sha256,
)
from attnopt.compiler.artifact import load as load_folder
from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import require_weights
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import apply_plan, read
from attnopt.compiler.plan import Outcome, Plan
from attnopt.compiler.program import Program

Progress = Callable[[str, float], None]
# Of the speed ratio a check may lose before it says slower: machines differ from day to day.
SLACK = 0.10


@dataclass(frozen=True)
class Applied:
    """A plan replayed on a model: the program and what every pass did."""

    program: Program
    plan: Plan
    outcomes: tuple[Outcome, ...]
    folder: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The replay as a JSON object."""
        return {
            "plan": self.plan.as_json(),
            "outcomes": [o.as_json() for o in self.outcomes],
            "folder": self.folder,
        }


def apply(
    plan: str | Path,
    model: str | Path,
    *,
    out: str | Path | None = None,
    inputs: str | Path | None = None,
    allow_globals: tuple[str, ...] = (),
    trust: bool = False,
    attention: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Applied:
    """Apply a saved plan to a model; the batches it was fitted on are taken from beside the plan.

    Raises `Problem` A511 when the plan was fitted on data that is not there, and A512 when a step
    that the plan needs does not apply.
    """
    say = progress or (lambda what, share: None)
    steps = read_plan(plan)
    home = Path(plan) if Path(plan).is_dir() else Path(plan).parent
    if out is not None:
        check_writable(out)
    loaded = load(
        str(model), inputs=Path(inputs) if inputs else None, allow_globals=allow_globals,
        trust=trust, attention=attention, dtype=dtype,
    )  # fmt: skip
    require_weights(loaded)
    program = read(loaded)
    require_sites(program)
    kept = load_calibration(home) if (home / "calibration.pt").is_file() else {}
    notes = Notes(program, kept.get("calibration", ()), kept.get("heldout", ()))
    done = 0

    def step(name: str) -> None:
        nonlocal done
        done += 1
        say(f"applying {name}", done / max(1, len(steps.steps)))

    made, outcomes = apply_plan(program, steps, notes, step)
    _require_all(steps, outcomes, home)
    folder = None
    if out is not None:
        saved = _result(home)
        folder = str(save(out, made, steps, replace(saved, outcomes=tuple(outcomes)), kept))
    return Applied(made, steps, tuple(outcomes), folder)


def _require_all(plan: Plan, outcomes: list[Outcome], home: Path) -> None:
    """Every target that a step names has to have been rewritten, as it was when the plan was
    made."""
    for step in plan.steps:
        named = [t for t in step.targets if t != "*"]
        rewrite = read_pass(step.rewrite).text
        for outcome in outcomes:
            if outcome.rewrite == rewrite and outcome.target in named and not outcome.applied:
                raise Problem(
                    "A512",
                    f"`{step.rewrite}` does not apply to `{outcome.target}` of this model",
                    where=outcome.at,
                    why=outcome.reason,
                    help=f"give the model that the plan in {home} was made for, "
                    "or search again with optimize",
                )


def _result(home: Path) -> Result:
    path = home / "report.json"
    if not path.is_file():
        raise Problem(
            "A511", "there is no report.json beside the plan", where=str(home),
            help="keep plan.json in the folder that optimize wrote",
        )  # fmt: skip
    return Result.from_json(json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    `ok` when speed and accuracy are within their bounds; `lines` say it figure by figure.
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
    a tenth; the accuracy bound `max_drop` or the report's. Raises `Problem` A513 when the model is
    not the one the folder was made from, and A514 when the run was judged by a metric of the
    user's and none is given.
    """
    say = progress or (lambda what, share: None)
    home = Path(folder)
    report = _result(home)
    _same_model(report, Path(model))
    _same_metric(report, metric)
    wanted = Wanted(_path(text), _path(calibration), _path(inputs), batch, length)
    loaded = load(
        str(model), inputs=wanted.inputs, text=wanted.text, allow_globals=allow_globals,
        trust=trust, attention=attention, dtype=dtype,
    )  # fmt: skip
    require_weights(loaded)
    data = gather(loaded, wanted, str(model))
    given, optimized = original(loaded), load_folder(home)
    base = baselines(given, data.timing)
    timing = compare(
        [*base.contenders, Contender("optimized", optimized)],
        data.timing,
        seconds=seconds,
        progress=say,
    )
    ratio = timing.ratio("optimized", timing.fastest([c.name for c in base.contenders]))
    bound = min_speed or _speed_bound(report)
    fast = ratio.interval.high >= bound
    lines = [
        f"speed {ratio.value:.2f}x (at least {bound:.2f}x wanted): {'ok' if fast else 'too slow'}"
    ]
    allowed = report.max_drop if max_drop is None else max_drop
    drop = upper = None
    close = True
    if data.evaluation:
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
    return Verdict(
        fast and close,
        ratio.value,
        ratio.interval.low,
        bound,
        drop,
        upper,
        allowed,
        tuple(lines),
        environment(),
    )


def _speed_bound(report: Result) -> float:
    """The least ratio that a run has to keep: its budget if it met that, else its ratio less a
    tenth."""
    if report.budget and report.met:
        return report.budget
    return report.speed.ratio.value * (1 - SLACK) if report.speed else 1.0


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


def _same_model(report: Result, model: Path) -> None:
    if not report.model_sha256 or not model.exists():
        return
    if source_sha256(model) != report.model_sha256:
        raise Problem(
            "A513", f"{model} is not the model that the folder was made from",
            why="its sha256 differs from the one in report.json",
            help="give the same file, or run attnopt apply on the new one",
        )  # fmt: skip
