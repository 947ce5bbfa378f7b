"""Replaying a saved run: `apply` rebuilds the model of a plan without searching, `check` measures a
folder again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attnopt.autotune import entries, wording
from attnopt.autotune.accuracy import evaluate
from attnopt.autotune.baselines import baselines
from attnopt.autotune.data import Data, gather
from attnopt.autotune.environment import environment
from attnopt.autotune.optimize import original, require_sites
from attnopt.autotune.request import Wanted
from attnopt.autotune.result import Result, Speed
from attnopt.autotune.timing import Contender, compare
from attnopt.compiler.artifact import (
    CALIBRATION,
    REPORT,
    check_writable,
    load_calibration,
    read_plan,
    read_report,
    save,
    source_sha256,
)
from attnopt.compiler.artifact import load as load_folder
from attnopt.compiler.contract import Exactness, Notes, read_pass
from attnopt.compiler.cost import cost
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded, require_weights
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import apply_plan, read
from attnopt.compiler.plan import Outcome, Plan, require_applied
from attnopt.compiler.program import Batch, Program

Progress = Callable[[str, float], None]
# Of the speed ratio a check may lose before it says slower: machines differ from day to day.
SLACK = 0.10
UNMEASURED = (
    "the figures of the run were not measured on this model with this plan; this report holds none"
)


@dataclass(frozen=True)
class Applied:
    """A plan replayed on a model: the program, what every pass did, and what has to be known of
    it."""

    program: Program
    plan: Plan
    outcomes: tuple[Outcome, ...]
    folder: str | None = None
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The replay as a JSON object."""
        return {
            "plan": self.plan.as_json(),
            "outcomes": [o.as_json() for o in self.outcomes],
            "folder": self.folder,
            "warnings": list(self.warnings),
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
    command: str = "",
    progress: Progress | None = None,
) -> Applied:
    """Apply a saved plan to a model; the batches it was fitted on are taken from beside the plan.

    The figures of the run are kept where the model and the plan are those of the run, and dropped
    with a warning where they are not. Raises `Problem` A505 when the report beside the plan is
    missing or damaged, A511 when the plan was fitted on data that is not there, and A512 when a
    rewrite that the plan needs does not apply.
    """
    say = progress or (lambda what, share: None)
    steps = read_plan(plan)
    home = Path(plan) if Path(plan).is_dir() else Path(plan).parent
    saved = report_of(home) if out is not None or (home / REPORT).is_file() else None
    require_data(steps, saved, home)
    if out is not None:
        check_writable(out)
    loaded = load(
        str(model), inputs=Path(inputs) if inputs else None, allow_globals=allow_globals,
        trust=trust, attention=attention, dtype=dtype,
    )  # fmt: skip
    require_weights(loaded)
    again = rebuild(loaded, steps, home, saved, model, say)
    warnings = (UNMEASURED,) if saved is not None and not again.known else ()
    folder = None
    if out is not None:
        assert saved is not None
        report = replace(saved, outcomes=again.outcomes)
        if not again.known:
            report = _unmeasured(report, loaded, again.original, steps, again.sha, command)
        folder = str(save(out, again.program, steps, report, again.kept))
    return Applied(again.program, steps, again.outcomes, folder, warnings)


@dataclass(frozen=True)
class Rebuilt:
    """A plan replayed: the program before and after, and what every pass did.

    `sha` is the model file's, `known` says that model and plan are those of the run, `kept` holds
    the batches that the plan was fitted on.
    """

    original: Program
    program: Program
    outcomes: tuple[Outcome, ...]
    sha: str
    known: bool
    kept: dict[str, list[Batch]]


def rebuild(
    loaded: Loaded,
    steps: Plan,
    home: Path,
    saved: Result | None,
    model: str | Path,
    say: Progress,
) -> Rebuilt:
    """Apply the steps of a plan in the folder `home`, whose report is `saved`, to a loaded model.

    Raises `Problem` A512 when a rewrite that the plan needs does not apply.
    """
    program = read(loaded)
    require_sites(program)
    kept = load_calibration(home) if (home / CALIBRATION).is_file() else {}
    notes = Notes(
        program, kept.get("calibration", ()), kept.get("heldout", ()),
        saved.target if saved else "cpu", saved.seed if saved else 0, kept.get("training", ()),
        progress=say,
    )  # fmt: skip
    done = 0

    def step(name: str) -> None:
        nonlocal done
        done += 1
        say(f"applying {name}", done / max(1, len(steps.steps)))

    made, outcomes = apply_plan(program, steps, notes, step)
    sha = source_sha256(model) if Path(model).exists() else ""
    known = saved is not None and sha != "" and (sha, steps) == (saved.model_sha256, saved.plan)
    require_applied(_wanted(steps, saved, known), outcomes, home)
    return Rebuilt(program, made, tuple(outcomes), sha, known, kept)


def require_data(plan: Plan, saved: Result | None, home: Path) -> None:
    """Raise `Problem` A511 where the batches that an approximate step was fitted on are not there:
    what it makes depends on them. Only steps that changed nothing in the run do without."""
    if (home / CALIBRATION).is_file():
        return
    outcomes = saved.outcomes if saved else ()
    idle = {o.rewrite for o in outcomes} - {o.rewrite for o in outcomes if o.applied}
    for rewrite in (read_pass(step.rewrite) for step in plan.steps):
        if rewrite.exactness is Exactness.APPROXIMATE and rewrite.text not in idle:
            raise Problem(
                "A511", f"the data that `{rewrite.text}` was fitted on is not beside the plan",
                where=str(home / CALIBRATION),
                why="without it the plan would make another model",
                help=f"keep plan.json in the folder that optimize wrote, with its {CALIBRATION}",
            )  # fmt: skip


def _wanted(plan: Plan, saved: Result | None, known: bool) -> list[tuple[str, str]]:
    """The rewrites that have to apply, each with its target.

    They are those that the plan names targets for, less what the run's own record says was left
    alone; and, on the model of the run, all that were applied there. Guarded ones are left out:
    they depend on the machine and change no function.
    """
    outcomes = saved.outcomes if saved else ()
    refused = {(o.rewrite, o.target) for o in outcomes if not o.applied}
    recorded = [
        (o.rewrite, o.target)
        for o in outcomes
        if known and o.applied and o.exactness != Exactness.GUARDED.value
    ]
    return [*(pair for pair in plan.named() if pair not in refused), *recorded]


def _unmeasured(
    saved: Result, loaded: Loaded, program: Program, plan: Plan, sha: str, command: str
) -> Result:
    """The report of a plan on a model that no figure of the run was measured on: what was done, and
    no more."""
    return Result(
        model=loaded.name,
        workload=Data((program.example,), words={"timing": "nothing was timed"}).workload,
        target=saved.target, budget=None, max_drop=saved.max_drop, met=False, plan=plan,
        environment=environment(),
        sites=entries.sites(program, saved.outcomes, cost(program), None),
        sublayers=entries.sublayers(program, saved.outcomes), outcomes=saved.outcomes,
        refits=entries.refits(saved.outcomes), warnings=(UNMEASURED, *loaded.notes),
        command=command, seed=saved.seed, model_sha256=sha,
    )  # fmt: skip


def report_of(home: Path) -> Result:
    """The report of a run's folder. Raises `Problem` A505."""
    return Result.from_json(read_report(home))


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
    a tenth; the accuracy bound `max_drop` or the report's. The median decides, as in `optimize`.
    Raises `Problem` A410 for bounds that mean nothing, A505 when there is no readable report, A513
    when the model is not the one the folder was made from, A514 when the run was judged by a metric
    of the user's and none is given, and A515 when its figures are estimates.
    """
    say = progress or (lambda what, share: None)
    _require_bounds(min_speed, max_drop)
    home = Path(folder)
    report = report_of(home)
    _require_measured(report, home)
    same_model(report, Path(model))
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
    return Verdict(
        fast and close,
        speed.ratio.value,
        speed.ratio.value if speed.ratio.low is None else speed.ratio.low,
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
    if report.target != "cpu":
        raise Problem(
            "A515", f"the figures of this run are estimates for {report.target}",
            where=str(home), why="nothing was measured, so nothing can be measured again here",
            help="run optimize without --target for figures of this machine",
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


def same_model(report: Result, model: Path) -> None:
    """Raise `Problem` A513 where a model's file is there and is not the one of the run."""
    if not report.model_sha256 or not model.exists():
        return
    if source_sha256(model) != report.model_sha256:
        raise Problem(
            "A513", f"{model} is not the model that the folder was made from",
            why="its sha256 differs from the one in report.json",
            help="give the same file, or run attnopt apply on the new one",
        )  # fmt: skip
