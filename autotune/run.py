"""One optimization from the raised program to the result: exact rewrites, the race, the ceiling,
the search, the verdict."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attnopt.autotune import entries
from attnopt.autotune.accuracy import Accuracy, metric_of_original
from attnopt.autotune.cache_entry import CacheEntry
from attnopt.autotune.cache_run import CacheRun, require_cache
from attnopt.autotune.data import Data
from attnopt.autotune.diagnose import within
from attnopt.autotune.environment import environment
from attnopt.autotune.heal import healed
from attnopt.autotune.order import approximate, healing, ordered
from attnopt.autotune.pace import Pace, estimated, measured
from attnopt.autotune.place import Place
from attnopt.autotune.request import Request
from attnopt.autotune.result import AccuracyEntry, Ceiling, HealingEntry, Relaxation, Result
from attnopt.autotune.search import Limits, Search, Tried
from attnopt.autotune.sensitivity import Menu, Single, ceilings, menu, singles, worthwhile
from attnopt.autotune.workbench import Built, Workbench
from attnopt.codegen.target import target as known_target
from attnopt.compiler.contract import Exactness, read_pass
from attnopt.compiler.cost import Cost, cost
from attnopt.compiler.errors import Problem
from attnopt.compiler.plan import Outcome, Plan, Step
from attnopt.compiler.profile import Profile, ceiling, profile
from attnopt.compiler.program import Program

Progress = Callable[[str, float], None]
log = logging.getLogger("attnopt")
FINALISTS = 3
SENSITIVITY_SHARE = 0.35  # of the search's time


@dataclass
class Run:
    """The flow of one optimization; `go` runs it and answers the built plan and the result."""

    original: Callable[..., Any]
    program: Program
    data: Data
    request: Request
    place: Place
    task: str
    work: Path | None
    sha: str
    progress: Progress
    warnings: list[str] = field(default_factory=list)
    paces: dict[tuple[Step, ...], Pace] = field(default_factory=dict)
    healing: HealingEntry | None = None
    cache: CacheEntry | None = None
    relaxed: Relaxation | None = None  # where a budget of bytes is missed
    passed: set[tuple[Step, ...]] = field(default_factory=set)  # on evaluation data, unhealed

    def go(self) -> tuple[Built, Result]:
        """Run the whole flow."""
        known_target(self.place.target)
        self.bench = self._bench()
        if self.request.kv_bytes is not None:
            self._require_cache()
        if self.request.metric is not None:  # one that fails does so before anything is timed
            metric_of_original(self.bench.judging, self.request.metric)
        bytes_asked = self.request.kv_bytes is not None
        pace = self._pace(self.bench.build([])) if bytes_asked else self._exactly()
        exact = pace.built
        self.profile = self._profile(exact)
        found = ceilings(self.program, self.profile, approximate()) if self.profile else {}
        if bytes_asked:
            return self._finish(self._smaller(pace), found)
        self._say_ceilings(pace, found)
        if self._enough(pace) or not self.request.searches or not self._can_search():
            return self._finish(pace, found)
        tried, single = self._search(exact, pace, found)
        best = self._healed(self._final(pace, tried), tried)
        return self._finish(best.pace, found, tried, single, best.tried)

    def _require_cache(self) -> None:
        """See at once whether a smaller cache can be looked for, and leave out what would leave no
        cache at all."""
        if not self._has_data:
            raise Problem(
                "A410", "--kv-bytes needs real data",
                why="what a smaller cache loses is measured, and nothing is tried without",
                help="give --text FILE, or --inputs FILE with batches enough to judge on",
            )  # fmt: skip
        require_cache(self.program, timed=self.place.timed)
        self.bench.without = _padded()
        if self.data.workload.fill < 1:
            self.warnings.append(
                f"{', '.join(sorted(self.bench.without))} was left out: "
                f"{self.data.workload.fill:.0%} of the timed positions are real, and a packed "
                "program has no cache"
            )

    def _bench(self) -> Workbench:
        scope = {
            "model": self.sha or self.program.name, "environment": _stable(environment()),
            "target": self.place.target, "device": str(self.place.device),
            "metric": self.request.metric,
            "form": _form(self.program),
        }  # fmt: skip
        return Workbench(
            self.original, self.program, self.data, task=self.task, metric=self.request.metric,
            place=self.place, seed=self.request.seed, work=self.work, scope=scope,
            progress=self.progress, healed=self.request.heal is not None,
        )  # fmt: skip

    def _exactly(self) -> Pace:
        """The exact rewrites, raced; where they gain nothing over the baselines, without those that
        only pay on padded batches."""
        padded = _padded()
        if not self.place.timed:  # how many tokens are left is known when it runs
            self.bench.without = padded
            if self.data.workload.fill < 1:
                self.warnings.append(
                    f"{', '.join(sorted(padded))} was left out: what it gains is not estimated"
                )
        pace = self._pace(self.bench.build([]))
        used = {o.rewrite.partition("{")[0] for o in pace.built.outcomes if o.applied} & padded
        if pace.speed.verdict == "faster" or not used:
            return pace
        self.bench.without = padded
        other = self._pace(self.bench.build([]))
        if other.ratio > pace.ratio:
            self.warnings.append(
                f"{', '.join(sorted(used))} was left out: {self.data.workload.fill:.0%} of the "
                f"timed positions are real, and it ran at {pace.ratio:.2f}x"
            )
            return other
        self.bench.without = frozenset()
        return pace

    def _pace(self, built: Built, seconds: float = 8.0) -> Pace:
        if not self.place.timed:
            return estimated(self.bench, built, known_target(self.place.target))
        return measured(self.bench, built, seconds, self.request.budget)

    def _profile(self, exact: Built) -> Profile | None:
        if not self.place.timed:
            return None
        steps = [step for step in exact.plan.steps if read_pass(step.rewrite).scope == "site"]
        padded = self.bench.apply(Plan(tuple(steps)))  # a packed program has no sites any more
        return profile(padded.program, self.data.timing[0], repeats=3, progress=self.progress)

    def _say_ceilings(self, pace: Pace, found: dict[str, tuple[float, float]]) -> None:
        """Tell before anything is searched what there is to gain."""
        by = "" if pace.kind == "measured" else f" ({pace.kind})"
        log.info("exact rewrites: %.2fx over %s%s", pace.ratio, pace.speed.best, by)
        if self.profile is None:
            return
        if self.request.budget is not None and not self._enough(pace):
            log.info("the budget asks for %.2fx more than that", self.request.budget / pace.ratio)
        share = self.profile.attention_share
        log.info(
            "ceiling: attention, projections included, takes %.0f%% of the time; without all of it "
            "at most %.2fx more", 100 * share, ceiling(share),
        )  # fmt: skip
        for name, (part, limit) in found.items():
            log.info("ceiling: %s works on %.0f%%, at most %.2fx more", name, 100 * part, limit)

    def _enough(self, pace: Pace) -> bool:
        """Whether a pace meets the budget."""
        return self.request.budget is not None and pace.speed.reaches(self.request.budget)

    @property
    def _has_data(self) -> bool:
        """Whether there is real data to search and to judge on."""
        return bool(self.data.real and self.data.heldout and self.data.evaluation)

    def _can_search(self) -> bool:
        if self._has_data:
            return True
        self.warnings.append(
            "no real data was given, so nothing approximate was tried: "
            "give --text FILE or --inputs FILE"
        )
        return False

    def _search(
        self, exact: Built, pace: Pace, found: dict[str, tuple[float, float]]
    ) -> tuple[list[Tried], list[Single]]:
        request = self.request
        kinds = [k for k in approximate() if k.name not in found or worthwhile(found[k.name][1])]
        for kind in approximate():
            if kind not in kinds:
                self.warnings.append(
                    f"{kind.name} was not tried: its ceiling is {found[kind.name][1]:.2f}x, "
                    "under 1.05x"
                )
        single: list[Single] = []
        menus: list[Menu] = []
        for kind in kinds:
            seconds = request.seconds * SENSITIVITY_SHARE / max(1, len(kinds)) / 2
            each = singles(self.bench, kind, seconds)
            single += each
            made = menu(self.bench, kind, each, *found.get(kind.name, (0.0, 0.0)), seconds)
            if made.targets:
                menus.append(made)
        if not menus:
            self.warnings.append(
                "no approximate rewrite applies to this model; see the sites for the reasons"
            )
            return [], single
        wanted = None if request.budget is None else request.budget / pace.ratio
        limits = Limits(
            request.max_drop, wanted, request.most_trials, request.seconds * (1 - SENSITIVITY_SHARE)
        )
        journal = self.work / "study.journal" if self.work else None
        search = Search(self.bench, exact, menus, single, healing(), limits, journal, self._reaches)
        return search.run(), single

    def _reaches(self, tried: Tried) -> bool:
        """Whether a plan meets the budget in the form it would be saved in."""
        return self._enough(self._raced(tried))

    def _raced(self, tried: Tried) -> Pace:
        if tried.steps not in self.paces:
            self.paces[tried.steps] = self._pace(self.bench.build(list(tried.steps)))
        return self.paces[tried.steps]

    def _final(self, exact: Pace, tried: Sequence[Tried]) -> _Best:
        """Race the fastest feasible plans again, on evaluation data; the exact plan is always a
        contender."""
        ranked = sorted((t for t in tried if t.feasible and t.gain > 1.0), key=lambda t: -t.gain)
        best = _Best(exact, None)
        for candidate in ranked[:FINALISTS]:
            accuracy = self.bench.verdict(self.bench.build(list(candidate.steps)))
            verdict = accuracy.verdict(self.request.max_drop)
            if verdict != "pass":
                why = "is beyond it" if verdict == "fail" else "cannot tell"
                self.warnings.append(
                    f"plan {candidate.number} was within the bound on the heldout data; the "
                    f"evaluation data {why} ({accuracy.drop:.2%}, at most "
                    f"{accuracy.drop_upper:.2%}, {accuracy.sequences} sequences)"
                )
                continue
            self.passed.add(candidate.steps)
            pace = self._raced(candidate)
            if pace.ratio > best.pace.ratio:
                best = _Best(pace, candidate)
        return best

    def _healed(self, best: _Best, tried: Sequence[Tried]) -> _Best:
        """The winner, healed where that was asked for.

        Where it misses the budget, the plan that reaches it at the least loss is healed in its
        place. What was healed wins only if it is then within the bound; else the winner stays.
        """
        asked = self.request.heal
        if asked is None:
            return best
        chosen = best.tried if self._keeps(best.pace) else self._hopeful(best, tried)
        if chosen is None:
            return best
        before = self.bench.verdict(self._raced(chosen).built)
        made = healed(self.bench, list(chosen.steps), asked, before)
        self.healing = made.entry
        if made.entry.accepted:
            pace = self._pace(made.built)
            lost = self._lost(best, chosen, made.accuracy, pace)
            if not lost:
                return _Best(pace, chosen)
            self.healing = replace(made.entry, accepted=False, reason=lost)
        self.warnings.append(f"healing was not kept: {self.healing.reason}")
        return best

    def _keeps(self, pace: Pace) -> bool:
        return self.request.budget is None or self._enough(pace)

    def _hopeful(self, best: _Best, tried: Sequence[Tried]) -> Tried | None:
        """What to heal where the winner misses the budget: of the plans that were predicted to
        reach it, and do when raced, the one with the least loss; else the winner."""
        base = best.pace.ratio / (best.tried.gain if best.tried else 1.0)
        budget = self.request.budget or 0.0
        fast = [
            t for t in tried
            if t.gain * base >= budget and t.steps and t.steps not in self.passed
        ]  # fmt: skip
        for plan in sorted(fast, key=lambda t: t.drop_upper)[:FINALISTS]:
            pace = self._raced(plan)
            if self._enough(pace) and pace.ratio > best.pace.ratio:
                return plan
        return best.tried

    def _lost(self, best: _Best, chosen: Tried, accuracy: Accuracy, pace: Pace) -> str:
        """Why a healed plan does not win; empty where it does."""
        if accuracy.verdict(self.request.max_drop) != "pass":
            drop = f"it still drops by {accuracy.drop:.2%}, at most {accuracy.drop_upper:.2%}"
            if chosen is best.tried:
                return f"healed {drop}, on evaluation data; without it the plan is within the bound"
            return f"plan {chosen.number} reaches the budget; healed {drop}, on evaluation data"
        if chosen is not best.tried and pace.ratio <= best.pace.ratio:
            return f"healed, plan {chosen.number} is no faster than the winner"
        return ""

    def _smaller(self, exact: Pace) -> Pace:
        """What is taken under a budget of cache bytes, raced."""
        made = CacheRun(self.bench, exact.built, self.request).settle()
        self.cache, self.relaxed, self.healing = made.entry, made.relaxation, made.healing
        self.warnings += made.warnings
        return exact if made.built is exact.built else self._pace(made.built)

    def _finish(
        self,
        pace: Pace,
        found: dict[str, tuple[float, float]],
        tried: Sequence[Tried] = (),
        single: Sequence[Single] = (),
        chosen: Tried | None = None,
    ) -> tuple[Built, Result]:
        request, built = self.request, pace.built
        if request.heal is not None and self.healing is None:
            self.warnings.append("nothing was healed: only exact rewrites were made")
        accuracy = self._accuracy(built)
        exact = all(_exact(o) for o in built.outcomes if o.applied)
        entry = AccuracyEntry.of(accuracy, request.max_drop, exact) if accuracy else None
        passed = accuracy is None or accuracy.verdict(request.max_drop) == "pass"
        met = passed and (request.budget is None or self._enough(pace))
        met = met and (self.cache is None or self.cache.met)
        counted = self._cost()
        base = pace.ratio / chosen.gain if chosen else pace.ratio
        result = Result(
            model=self.program.name, workload=self.data.workload,
            target=self.place.target, device=str(self.place.device),
            budget=request.budget, max_drop=request.max_drop, met=met, plan=pace.plan,
            environment=environment(), baselines=pace.baselines, optimized=pace.optimized,
            speed=pace.speed, accuracy=entry, ceiling=self._ceiling(),
            ceilings=entries.ceilings(found),
            sites=entries.sites(self.program, built.outcomes, counted, self.profile),
            sublayers=entries.sublayers(self.program, built.outcomes), outcomes=built.outcomes,
            sensitivities=entries.sensitivities(single),
            diagnostics=within(self.program, self.data, request),
            trials=entries.trials(tried, base, chosen, pace.kind),
            relaxation=self._relaxation(met, tried, base, pace, accuracy),
            refits=entries.refits(built.outcomes), healing=self.healing,
            warnings=(*self.warnings, *pace.warnings),
            data=dict(self.data.words), seed=request.seed,
            decoding=entries.decoding(self.program, built.program, self.data.workload),
            cache=self.cache,
        )  # fmt: skip
        return built, result

    def _accuracy(self, built: Built) -> Accuracy | None:
        if not self.data.evaluation and self.request.metric is None:
            self.warnings.append("accuracy was not measured: there is no evaluation data")
            return None
        return self.bench.verdict(built)

    def _relaxation(
        self, met: bool, tried: Sequence[Tried], base: float, pace: Pace, accuracy: Accuracy | None
    ) -> Relaxation | None:
        if met or self.relaxed is not None:
            return None if met else self.relaxed
        return entries.relaxation(
            tried, base, self.request.budget, pace, self.request.max_drop, accuracy
        )

    def _ceiling(self) -> Ceiling | None:
        return entries.attention_ceiling(self.profile) if self.profile else None

    def _cost(self) -> Cost | None:
        return cost(self.program)


@dataclass(frozen=True)
class _Best:
    pace: Pace
    tried: Tried | None


def _padded() -> frozenset[str]:
    """The exact passes that only pay on padded batches."""
    return frozenset(kind.name for kind in ordered() if kind.valid_only)


def _exact(outcome: Outcome) -> bool:
    return read_pass(outcome.rewrite).exactness is not Exactness.APPROXIMATE


def _form(program: Program) -> list[str]:
    """What a model file leaves open: the dtypes it computes in, and how its attention is
    spelled."""
    dtypes = {str(p.dtype) for p in program.module.parameters()}
    return [*sorted(dtypes), *sorted({site.spelling for site in program.sites})]


def _stable(facts: dict[str, Any]) -> dict[str, Any]:
    """What of the environment has to be the same for a measurement to be used again."""
    return {key: value for key, value in facts.items() if key not in ("date", "load")}
