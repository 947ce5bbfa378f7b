"""The search: Optuna over how many targets each pass takes and with which options, under the
accuracy bound.

Each approximate pass is one integer (how many of its targets, the least harmful first) and its
options; healing is one switch. The bound is a constraint given to the sampler; the study lives in a
journal file, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from attnopt.autotune.sensitivity import Menu, Single
from attnopt.autotune.workbench import Built, Workbench, cut_torn_line
from attnopt.compiler.contract import Pass, read_pass
from attnopt.compiler.plan import Step

_HOPELESS = 4.0  # times the bound: a plan this far off is not timed


@dataclass(frozen=True)
class Tried:
    """One plan that was tried: its drop on heldout data and its gain over the exact plan, both
    measured."""

    number: int
    steps: tuple[Step, ...]
    drop: float
    drop_upper: float
    gain: float
    feasible: bool
    tier: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Limits:
    """When to stop: after `trials`, after `seconds`, or when `gain` is reached within
    `max_drop`."""

    max_drop: float
    gain: float | None = None
    trials: int = 40
    seconds: float = 600.0


@dataclass
class Search:
    """One study.

    `menus` are the passes to combine, `healers` the passes that repair them. `confirm` is asked
    once of a plan that seems to reach what is wanted; the search goes on where it says no.
    """

    bench: Workbench
    exact: Built
    menus: Sequence[Menu]
    singles: Sequence[Single]
    healers: Sequence[type[Pass]]
    limits: Limits
    journal: Path | None = None
    confirm: Callable[[Tried], bool] = lambda tried: True
    tried: list[Tried] = field(default_factory=list)
    refuted: set[int] = field(default_factory=set)

    def run(self) -> list[Tried]:
        """Try plans until a limit is reached; returns all of them, those of an interrupted run
        included."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = None
        if self.journal is not None:
            if self.journal.is_file():
                cut_torn_line(self.journal)
            storage = JournalStorage(JournalFileBackend(str(self.journal)))
        sampler = TPESampler(
            seed=self.bench.seed,
            n_startup_trials=8,
            multivariate=True,
        )
        study = optuna.create_study(
            storage=storage,
            study_name=f"{self.bench.journal.scope} {self.limits.max_drop:g}",
            sampler=sampler,
            direction="maximize",
            load_if_exists=True,
        )
        self.tried = [_read(t) for t in study.trials if t.state is TrialState.COMPLETE]
        if not study.trials:
            for start in self._starts():
                study.enqueue_trial(start, skip_if_exists=True)
        deadline = time.monotonic() + self.limits.seconds
        while (
            len(self.tried) < self.limits.trials and time.monotonic() < deadline and not self._met()
        ):
            trial = study.ask()
            done = self._try(trial)
            study.tell(trial, done.gain)
            self.tried.append(done)
            best = self.best()
            said = f"{best.gain:.2f}x" if best else "none within the bound yet"
            self.bench.progress(f"search, best so far {said}", len(self.tried) / self.limits.trials)
        return self.tried

    def best(self) -> Tried | None:
        """The fastest plan tried that stays within the bound."""
        return max((t for t in self.tried if t.feasible), key=lambda t: t.gain, default=None)

    def _met(self) -> bool:
        """Whether a plan reaches the gain that is wanted, confirmed; the fastest is asked first."""
        if self.limits.gain is None:
            return False
        for tried in sorted(self.tried, key=lambda t: -t.gain):
            if tried.gain < self.limits.gain:
                return False
            if tried.feasible and tried.number not in self.refuted:
                if self.confirm(tried):
                    return True
                self.refuted.add(tried.number)
        return False

    def _try(self, trial: optuna.Trial) -> Tried:
        steps = self.bench.effective(self._steps(trial))
        trial.set_user_attr("steps", [[s.rewrite, list(s.targets)] for s in steps])
        accuracy = self.bench.drop(steps)
        drop = accuracy.drop if accuracy.feasible else math.inf
        upper = accuracy.drop_upper if accuracy.feasible else math.inf
        feasible = accuracy.verdict(self.limits.max_drop) == "pass"
        gain = 0.0
        if upper <= _HOPELESS * max(self.limits.max_drop, 0.01):
            gain = self.bench.gain(steps, self.exact)
        reason = accuracy.reason or ("" if gain else "not timed: too far outside the bound")
        done = Tried(trial.number, tuple(steps), drop, upper, gain, feasible, accuracy.tier, reason)
        trial.set_user_attr("tried", _plain(done))
        beyond = upper - self.limits.max_drop if math.isfinite(upper) else 1e9
        trial.set_constraint("drop", beyond)
        return done

    def _steps(self, trial: optuna.Trial) -> list[Step]:
        steps: list[Step] = []
        for menu in self.menus:
            count = trial.suggest_int(f"{menu.kind.name}.count", 0, len(menu.targets))
            options = {
                key: trial.suggest_categorical(f"{menu.kind.name}.{key}", list(values))
                for key, values in menu.kind.space().items()
            }
            if count:
                steps.append(Step(menu.kind(**options).text, menu.targets[:count]))
        for kind in self.healers:
            if trial.suggest_categorical(kind.name, [True, False]) and steps:
                steps.append(Step(kind().text, _sites(self.bench, steps)))
        return steps

    def _starts(self) -> list[dict[str, Any]]:
        """Plans predicted from the single sensitivities: damage is taken to add up, one pass at a
        time and all together."""
        none = {f"{menu.kind.name}.count": 0 for menu in self.menus}
        plain = {kind.name: True for kind in self.healers}
        for menu in self.menus:
            for key in menu.kind.space():
                plain[f"{menu.kind.name}.{key}"] = getattr(menu.kind(), key)
        starts: list[dict[str, Any]] = []
        together = dict(none)
        for menu in self.menus:
            for share in (0.5, 1.0, 2.0):
                count = self._within(menu, share * self.limits.max_drop)
                starts.append({**plain, **none, f"{menu.kind.name}.count": count})
            together[f"{menu.kind.name}.count"] = self._within(
                menu, self.limits.max_drop / len(self.menus)
            )
        return [{**plain, **together}, *starts]

    def _within(self, menu: Menu, allowed: float) -> int:
        by_target = {
            s.target: s.drop for s in self.singles if s.rewrite.startswith(menu.kind.name + "{")
        }
        total, count = 0.0, 0
        for target in menu.targets:
            total += max(0.0, by_target[target])
            if total > allowed:
                break
            count += 1
        return max(1, count)


def _sites(bench: Workbench, steps: Sequence[Step]) -> tuple[str, ...]:
    """Sites that healing should look at: all of them when a sublayer was changed, else those that
    were."""
    if any(read_pass(step.rewrite).scope != "site" for step in steps):
        return ("*",)
    touched = {target for step in steps for target in step.targets}
    return tuple(site.id for site in bench.program.sites if site.id in touched)


def _plain(done: Tried) -> dict[str, Any]:
    numbers = {key: _number(getattr(done, key)) for key in ("drop", "drop_upper", "gain")}
    return {**numbers, "feasible": done.feasible, "tier": done.tier, "reason": done.reason}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read(trial: FrozenTrial) -> Tried:
    known = trial.user_attrs["tried"]
    steps = tuple(Step(rewrite, tuple(targets)) for rewrite, targets in trial.user_attrs["steps"])
    drop, upper = (math.inf if known[k] is None else known[k] for k in ("drop", "drop_upper"))
    return Tried(
        trial.number,
        steps,
        drop,
        upper,
        known["gain"],
        known["feasible"],
        known["tier"],
        known["reason"],
    )


def front(tried: Sequence[Tried]) -> set[int]:
    """Numbers of the plans that no other timed plan beats in both drop and gain."""
    timed = [t for t in tried if t.gain > 0 and math.isfinite(t.drop)]
    return {
        t.number
        for t in timed
        if not any(
            o.gain >= t.gain and o.drop <= t.drop and (o.gain, -o.drop) != (t.gain, -t.drop)
            for o in timed
        )
    }


def shown(steps: Sequence[Step]) -> str:
    """A plan's approximate steps as one line."""
    return (
        "; ".join(f"{s.rewrite} @ {','.join(s.targets)}" for s in steps) or "exact rewrites alone"
    )
