"""Which tile sizes of a kernel are worth timing: Optuna over its space, led by the static score.

Nothing runs here. Tile sizes that do not compile, do not fit the target or spill are infeasible,
and counted by reason; the rest are ordered by a score that is a heuristic (`static_score`).
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import optuna
from optuna.samplers import TPESampler

from attnopt.autotune.compile_pool import Compiled, Failed, Job
from attnopt.autotune.timing import Progress
from attnopt.codegen.kernel import Kernel, Load
from attnopt.codegen.static_score import Score, Static, misfit, score
from attnopt.codegen.target import Target

Compile = Callable[[Sequence[Job]], list[Compiled]]
TRIALS = 64
_BEST = 4  # whose neighbours are tried where the sampler repeats itself
_AT_ONCE = 4  # asked before any is told; not the number of processes, which must not change results


@dataclass(frozen=True)
class Candidate:
    """Tile sizes that fit the target, what they take of it, and their score."""

    kernel: Kernel[Any]
    statics: tuple[Static, ...]
    score: Score


@dataclass(frozen=True)
class Found:
    """What a search came to: `candidates` by score, the best first, the default among them where it
    fits (`default_misfit` says why not); how many were `tried`, and why how many were dropped."""

    candidates: tuple[Candidate, ...]
    default_misfit: str
    tried: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    def shortlist(self, default: Kernel[Any], most: int) -> tuple[Candidate, ...]:
        """The best `most` by score, the default among them where it fits."""
        best = list(self.candidates[:most])
        own = [c for c in self.candidates if c.kernel == default]
        if own and own[0] not in best:
            best[-1:] = own
        return tuple(best)


def search(
    cls: type[Kernel[Any]],
    spec: Any,
    load: Load,
    target: Target,
    compile: Compile,
    *,
    trials: int = TRIALS,
    seconds: float = 300.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Found:
    """Try tile sizes, the default first, until `trials` are tried or `seconds` are spent. A space
    of no more than `trials` is tried whole."""
    default = cls.default(spec, target, load)
    tries = _Tries(default, spec, load, target, compile)
    tries.run([default])
    ended = time.monotonic() + seconds
    space = cls.space(target)
    small = math.prod(map(len, space.values())) <= trials
    picks = _Whole(tries, space, seed) if small else _Sampled(tries, space, seed)
    while len(tries.outcomes) < trials and time.monotonic() < ended:
        room = min(_AT_ONCE, trials - len(tries.outcomes))
        chosen = picks(tries, room)
        if not chosen:
            break
        tries.run(chosen)
        if progress is not None:
            progress(f"compiling {cls.name}", len(tries.outcomes) / trials)
    own = tries.outcomes[default]
    fitting = [c for c in tries.outcomes.values() if isinstance(c, Candidate)]
    return Found(
        tuple(sorted(fitting, key=lambda c: -c.score.value)),
        own if isinstance(own, str) else "",
        len(tries.outcomes),
        dict(Counter(sorted(o for o in tries.outcomes.values() if isinstance(o, str)))),
    )


@dataclass
class _Tries:
    """What became of all tile sizes tried: a candidate, or why not."""

    default: Kernel[Any]
    spec: Any
    load: Load
    target: Target
    compile: Compile
    outcomes: dict[Kernel[Any], Candidate | str] = field(default_factory=dict)

    def run(self, kernels: Sequence[Kernel[Any]]) -> None:
        jobs = [Job(kernel, self.spec, self.load, self.target) for kernel in kernels]
        for job, made in zip(jobs, self.compile(jobs), strict=True):
            self.outcomes[job.kernel] = self._outcome(job, made)

    def _outcome(self, job: Job, made: Compiled) -> Candidate | str:
        if isinstance(made, Failed):
            return made.why
        why = misfit(made, self.target)
        if why:
            return why
        rated = score(made, job.kernel, self.spec, self.load, self.target)
        return Candidate(job.kernel, tuple(made), rated)


class _Whole:
    """Picks every combination, in an order of the seed: a search that is cut short has seen all
    corners."""

    def __init__(self, tries: _Tries, space: Mapping[str, Sequence[Any]], seed: int) -> None:
        chosen = [dict(zip(space, values, strict=True)) for values in product(*space.values())]
        self.every = [replace(tries.default, **values) for values in chosen]
        random.Random(seed).shuffle(self.every)

    def __call__(self, tries: _Tries, most: int) -> list[Kernel[Any]]:
        return [kernel for kernel in self.every if kernel not in tries.outcomes][:most]


class _Sampled:
    """Picks what Optuna's sampler suggests; where that was tried, a neighbour of the best."""

    def __init__(self, tries: _Tries, space: Mapping[str, Sequence[Any]], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space = space
        self.random = random.Random(seed)
        self.asked: dict[Kernel[Any], optuna.Trial] = {}
        self.study = optuna.create_study(
            direction="maximize",
            sampler=TPESampler(
                seed=seed, n_startup_trials=12, multivariate=True, constant_liar=True,
            ),
        )  # fmt: skip
        for kernel in tries.outcomes:
            if all(getattr(kernel, key) in values for key, values in self.space.items()):
                self.study.enqueue_trial({key: getattr(kernel, key) for key in self.space})
                self.asked[kernel], _ = self._ask()

    def __call__(self, tries: _Tries, most: int) -> list[Kernel[Any]]:
        for kernel, trial in self.asked.items():
            value, constraint = _told(tries.outcomes[kernel])
            trial.set_constraint("fits", constraint)
            self.study.tell(trial, value)
        self.asked = {}
        while len(self.asked) < most:
            trial, chosen = self._ask()
            kernel = replace(tries.default, **chosen)
            if kernel in tries.outcomes or kernel in self.asked:
                self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
                self.study.enqueue_trial(self._untried(tries))
                continue
            self.asked[kernel] = trial
        return list(self.asked)

    def _ask(self) -> tuple[optuna.Trial, dict[str, Any]]:
        trial = self.study.ask()
        return trial, {k: trial.suggest_categorical(k, list(v)) for k, v in self.space.items()}

    def _untried(self, tries: _Tries) -> dict[str, Any]:
        """One of the best with one field changed, where such a neighbour is left; else anything."""
        fitting = [c for c in tries.outcomes.values() if isinstance(c, Candidate)]
        best = sorted(fitting, key=lambda c: -c.score.value)[:_BEST]
        near = [
            replace(candidate.kernel, **{key: value})
            for candidate in best
            for key, values in self.space.items()
            for value in values
        ]
        left = [k for k in near if k not in tries.outcomes and k not in self.asked]
        while not left:
            chosen = {key: self.random.choice(values) for key, values in self.space.items()}
            kernel = replace(tries.default, **chosen)
            left = [] if kernel in tries.outcomes or kernel in self.asked else [kernel]
        picked = self.random.choice(left)
        return {key: getattr(picked, key) for key in self.space}


def _told(outcome: Candidate | str) -> tuple[float, float]:
    """The value and the constraint of a trial: what is infeasible has a constraint above 0."""
    return (0.0, 1.0) if isinstance(outcome, str) else (outcome.score.value, -1.0)
