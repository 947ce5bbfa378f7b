"""Replaying a saved run: `apply` rebuilds the model of a plan without searching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnopt.autotune import entries
from attnopt.autotune.data import Data
from attnopt.autotune.environment import environment
from attnopt.autotune.optimize import require_sites
from attnopt.autotune.result import Result
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
from attnopt.compiler.contract import Exactness, Notes, read_pass
from attnopt.compiler.cost import cost
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded, require_weights
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import apply_plan, read
from attnopt.compiler.plan import Outcome, Plan, require_applied
from attnopt.compiler.program import Batch, Program

Progress = Callable[[str, float], None]
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
