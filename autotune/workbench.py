"""The bench of one run: builds plans, measures their accuracy and speed, and never measures one
thing twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attnopt.autotune.accuracy import Accuracy, evaluate
from attnopt.autotune.baselines import Baselines, baselines, compiled_form, differs
from attnopt.autotune.data import Data
from attnopt.autotune.order import compose
from attnopt.autotune.outputs import tensors
from attnopt.autotune.place import Place
from attnopt.autotune.teacher import Teacher
from attnopt.autotune.timing import Contender, Timing, compare
from attnopt.codegen.roofline import estimate
from attnopt.codegen.target import target
from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.lower import lower
from attnopt.compiler.pipeline import apply_pass, apply_plan, opening
from attnopt.compiler.plan import Outcome, Plan, Step
from attnopt.compiler.program import Program

Progress = Callable[[str, float], None]
CANDIDATE = "candidate"
KEPT_PROGRAMS = 64
SKETCH_SHARE = 3  # one in so many held-out batches orders single rewrites


@dataclass(frozen=True)
class Built:
    """A plan applied: the program, its lowered module, and what every pass did."""

    plan: Plan
    program: Program
    module: fx.GraphModule
    outcomes: tuple[Outcome, ...]


class Journal:
    """Measurements on disk, one JSON line each, so that an interrupted run repeats none of them."""

    def __init__(self, path: Path | None, scope: str) -> None:
        self.path, self.scope = path, scope
        self.found: dict[str, Any] = {}
        if path is not None and path.is_file():
            cut_torn_line(path)
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                if entry.get("scope") == self.scope:
                    self.found[entry["key"]] = entry["value"]

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value stored under a key, or what `measure` gives, stored."""
        if key not in self.found:
            self.found[key] = measure()
            if self.path is not None:
                line = json.dumps({"scope": self.scope, "key": key, "value": self.found[key]})
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
        return self.found[key]


def cut_torn_line(path: Path) -> None:
    """Cut off a last line that a run that was killed did not write to its end."""
    with path.open("rb+") as file:
        written = file.read()
        if not written.endswith(b"\n"):
            file.truncate(written.rfind(b"\n") + 1)


class Workbench:
    """Everything that a search needs to try a plan on a model.

    `original` is the model as given (what is timed as the baseline); `program` its raised form.
    Heldout data decides inside the search, evaluation data gives the verdict. `healed` says that
    the winner will be.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        program: Program,
        data: Data,
        *,
        task: str,
        metric: str | None = None,
        place: Place | None = None,
        seed: int = 0,
        work: Path | None = None,
        scope: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        healed: bool = False,
    ) -> None:
        self.original, self.program, self.data, self.task, self.metric = (
            original,
            program,
            data,
            task,
            metric,
        )
        self.without = frozenset[str]()  # exact passes that do not pay here
        self.seed, self.progress = seed, progress or (lambda what, share: None)
        self.place = place or Place()
        self.notes = Notes(
            program, data.calibration, data.heldout, self.place.target, seed, data.training, work,
            self.progress, healed,
        )  # fmt: skip
        self.searching = Teacher(original, data.heldout, task)
        few = -(-len(data.heldout) // SKETCH_SHARE)
        self.sketching = Teacher(original, data.heldout[:few], task)
        self.judging = Teacher(original, data.evaluation, task)
        named = json.dumps(
            {**(scope or {}), "data": _digest(data), "seed": seed}, sort_keys=True, default=str
        )
        self.journal = Journal(
            work / "measurements.jsonl" if work else None,
            hashlib.sha256(named.encode()).hexdigest(),
        )
        self._built: dict[tuple[tuple[Step, ...], bool], tuple[Program, tuple[Outcome, ...]]] = {}
        self._opened: dict[tuple[Step, ...], tuple[Program, tuple[Outcome, ...]]] = {}
        self._baselines: Baselines | None = None

    def compose(self, steps: list[Step]) -> Plan:
        """Approximate steps together with all exact ones but those of `without`."""
        return compose(steps, self.without)

    def build(self, steps: list[Step], verify: bool = True) -> Built:
        """Apply approximate steps together with the exact ones, each at its place in the order."""
        return self.apply(self.compose(steps), verify)

    def effective(self, steps: list[Step]) -> list[Step]:
        """The approximate steps, each at those of its targets where it changes something when all
        are applied together."""
        outcomes = self.build(steps, verify=False).outcomes
        applied = {(outcome.rewrite, outcome.target) for outcome in outcomes if outcome.applied}
        made = []
        for step in steps:
            rewrite = read_pass(step.rewrite).text
            changed = {target for at, target in applied if at == rewrite}
            targets = tuple(t for t in step.targets if t in changed or (t == "*" and changed))
            if targets:
                made.append(Step(step.rewrite, targets))
        return made

    def apply(self, plan: Plan, verify: bool = True) -> Built:
        """Apply a plan as it stands; shared beginnings of plans are applied once.

        Inside the search `verify` is off: the exact rewrites of the opening are always compared,
        those behind it on the exact plan, and again on the winner.
        """
        first = opening(plan)
        program, outcomes = self._opening(plan.steps[:first])
        notes = replace(self.notes, original=program)
        for i in range(first, len(plan.steps)):
            key = (plan.steps[: i + 1], verify)
            if key not in self._built:
                step = plan.steps[i]
                rewrite = read_pass(step.rewrite)
                made, done = apply_pass(program, rewrite, step.targets, notes, verify)
                if len(self._built) >= KEPT_PROGRAMS:
                    self._built.pop(next(iter(self._built)))
                self._built[key] = (made, (*outcomes, *done))
            program, outcomes = self._built[key]
        return Built(plan, program, lower(program), outcomes)

    def opened(self) -> Notes:
        """The notes with what the opening of every plan leaves as the original: the same function,
        faster to calibrate on."""
        plan = self.compose([])
        program, _ = self._opening(plan.steps[: opening(plan)])
        return replace(self.notes, original=program)

    def _opening(self, steps: tuple[Step, ...]) -> tuple[Program, tuple[Outcome, ...]]:
        """The exact steps that a plan begins with, applied and verified once."""
        if steps not in self._opened:
            made, outcomes = apply_plan(self.program, Plan(steps), self.notes)
            self._opened[steps] = (made, tuple(outcomes))
        return self._opened[steps]

    def drop(self, steps: list[Step], sketch: bool = False) -> Accuracy:
        """Accuracy on the heldout data (a third of it for a sketch), from the journal where it was
        measured before."""
        key = f"{'sketch' if sketch else 'heldout'} {_key(self.compose(steps))}"
        teacher = self.sketching if sketch else self.searching
        found = self.journal.get(
            key, lambda: self._drop(self.build(steps, verify=False), teacher).as_json()
        )
        return Accuracy.from_json(found)

    def verdict(self, built: Built) -> Accuracy:
        """Accuracy on the evaluation data."""
        return self._drop(built, self.judging)

    def _drop(self, built: Built, teacher: Teacher) -> Accuracy:
        return evaluate(
            teacher,
            built.module,
            teacher.batches,
            self.task,
            self.progress,
            metric=self.metric,
            seed=self.seed,
        )

    @property
    def baselines(self) -> Baselines:
        """Eager and torch.compile of the model as given, warmed; made once."""
        if self._baselines is None:
            self._baselines = baselines(
                self.original, self.data.timing, progress=lambda what: self.progress(what, 0.0)
            )
        return self._baselines

    def compiled(self, built: Built) -> tuple[Callable[..., Any] | None, str]:
        """torch.compile of a built plan, warmed; None and the reason when it cannot be compiled or
        computes something else."""
        made, reason = compiled_form(built.module, self.data.timing)
        if made is None:
            return None, reason
        reason = differs(made, built.module, self.data.timing)
        return (None, reason) if reason else (made, "")

    def race(
        self, forms: Mapping[str, Callable[..., Any]], seconds: float, rounds: int = 7
    ) -> Timing:
        """Time forms of the model in pairs against both baselines."""
        contenders = [
            *self.baselines.contenders,
            *(Contender(name, form) for name, form in forms.items()),
        ]
        return compare(
            contenders, self.data.timing, seconds=seconds, rounds=rounds, progress=self.progress
        )

    def gain(self, steps: list[Step], over: Built, seconds: float = 2.0) -> float:
        """How many times as fast the steps are as `over`, from the journal where known.

        On the machine at hand both run eagerly, paired; for a device that is not there both are
        estimated.
        """
        key = f"gain {_key(self.compose(steps))} over {_key(over.plan)}"

        def measure() -> float:
            if not self.place.timed:
                known = target(self.place.target)
                built = self.build(steps, verify=False)
                return (
                    estimate(over.program, known).seconds / estimate(built.program, known).seconds
                )
            pair = [
                Contender("over", over.module),
                Contender(CANDIDATE, self.build(steps, verify=False).module),
            ]
            timing = compare(pair, self.data.timing, seconds=seconds, rounds=5, precision=0.02)
            return timing.ratio(CANDIDATE, "over").value

        return float(self.journal.get(key, measure))


def _digest(data: Data) -> str:
    """A hash of everything that is fitted, judged and timed on."""
    made = hashlib.sha256()
    for batches in (data.timing, data.calibration, data.heldout, data.evaluation):
        for batch in batches:
            for tensor in tensors([*batch.args, *batch.kwargs.items()]):
                made.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().cpu().reshape(-1)
                made.update(flat.view(torch.uint8).numpy().tobytes())
        made.update(b"/")
    return made.hexdigest()


def _key(plan: Plan) -> str:
    return json.dumps(plan.as_json(), sort_keys=True)
