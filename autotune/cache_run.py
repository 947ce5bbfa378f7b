"""A run under a budget of cache bytes: which plan is taken, what would do where none is, and what
is told of all of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

from attnopt.autotune import wording as say
from attnopt.autotune.cache_entry import CacheEntry, CachePlan, PerLayer, most_bytes
from attnopt.autotune.cache_offer import Offers
from attnopt.autotune.cache_search import CacheSearch, Kept, Limits, best, by_loss, loses_less
from attnopt.autotune.entries import too_few
from attnopt.autotune.heal import healed
from attnopt.autotune.number import Number
from attnopt.autotune.per_layer import Varied, vary
from attnopt.autotune.request import Request
from attnopt.autotune.result import HealingEntry, Relaxation
from attnopt.autotune.step_time import load_of
from attnopt.autotune.wording import share as percent
from attnopt.autotune.workbench import Built, Workbench
from attnopt.compiler.decode import derive
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Program

FINALISTS = 3  # plans that are judged on the evaluation data


def require_cache(program: Program, timed: bool = True) -> None:
    """Raise the `Problem` (A701 to A706) of a model that no decoder with a cache can be derived
    from, or A403 where its steps are to be `timed` and cannot be."""
    try:
        decoder = derive(program)
    except Problem as problem:
        raise Problem(
            problem.code, f"--kv-bytes: {program.name} has no cache to shrink: {problem.what}",
            where=problem.where, why=problem.why,
            help=problem.help or "leave --kv-bytes out to optimize whole sequences",
        ) from problem  # fmt: skip
    if timed:
        load_of(decoder)


@dataclass(frozen=True)
class Settled:
    """The outcome: what is built, what is told of it, and where the budget is missed, what would
    do."""

    built: Built
    entry: CacheEntry
    relaxation: Relaxation | None
    healing: HealingEntry | None
    warnings: tuple[str, ...]


@dataclass
class CacheRun:
    """One run; `settle` does it. `exact` is the exact plan, built."""

    bench: Workbench
    exact: Built
    request: Request
    varied: list[Varied] = field(default_factory=list)
    healing: HealingEntry | None = None
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.request.kv_bytes is not None
        self.whole = derive(self.exact.program, check=False)
        self.wanted = self.request.kv_bytes
        limits = Limits(
            most_bytes(self.wanted, self.whole.bytes_per_token()), self.request.max_drop,
            self.request.most_trials, self.request.seconds,
        )  # fmt: skip
        self.search = CacheSearch(self.bench, self.whole, limits)
        self.offers = Offers(self.search)
        self.least: Kept | None = None  # that the result was held against: it lost least

    def settle(self) -> Settled:
        """The plan of the least loss within the budget, healed where that was asked for; where
        there is none, the one that comes nearest to it within the bound."""
        kept = self._found()
        built = self._healed(kept)
        relaxation = None
        if built is None and kept is None:
            kept = self._nearest()
            relaxation = self._relaxation(kept)
        elif kept is None:
            kept = self._hopeful()
        if built is None:
            built = self.exact if kept is None else self.bench.build(list(kept.steps))
        entry = self._entry(built, kept)
        warnings = (*self.offers.warnings, *self.search.untold, *self.warnings)
        return Settled(built, entry, relaxation, self.healing, warnings)

    def _found(self) -> Kept | None:
        """Search, and answer with the best plan within the budget that may be offered."""
        self.search.uniform(self._fast)
        fits = sorted(self.search.fits(), key=by_loss)
        kinds = ([kept for kept in fits if kept.latent is latent][:1] for latent in (False, True))
        for uniform in sorted(itertools.chain(*kinds), key=by_loss):
            if self._fast(uniform):
                self.varied += vary(self.search, uniform)
        worse = {v.kept.steps for v in self.varied if not v.accepted}
        rest = [kept for kept in self.search.good() if kept.steps not in worse]
        while rest and len(self.offers.beyond) < FINALISTS:
            kept, least = best(rest, self.bench.seed), min(rest, key=by_loss)
            rest.remove(kept)
            if not self.offers.why_not(kept):
                self.least = least
                return kept
        self.search.looser(self._fast)
        return None

    def _fast(self, kept: Kept) -> bool:
        return not self.offers.too_slow(kept)

    def _hopeful(self) -> Kept | None:
        """What to heal where no plan is within the bound: of those within the budget whose steps
        are not too slow, the one that loses least."""
        fits = sorted(self.search.fits(), key=by_loss)
        return next(filter(self._fast, fits), None)

    def _healed(self, kept: Kept | None) -> Built | None:
        """The plan after healing; None where that was not asked for or is not kept."""
        asked = self.request.heal
        chosen = self._hopeful() if kept is None and asked is not None else kept
        if asked is None or chosen is None:
            return None
        before = self.bench.verdict(self.bench.build(list(chosen.steps)))
        made = healed(self.bench, list(chosen.steps), asked, before)
        self.healing = made.entry
        within = made.accuracy.verdict(self.request.max_drop) == "pass"
        if made.entry.accepted and within:
            return made.built
        if made.entry.accepted:
            drop, upper = percent(made.accuracy.drop), percent(made.accuracy.drop_upper)
            why = f"healed it drops by {drop}, at most {upper}, on evaluation data"
            self.healing = replace(made.entry, accepted=False, reason=why)
        self.warnings.append(f"healing was not kept: {self.healing.reason}")
        return None

    def _nearest(self) -> Kept | None:
        """The plan that keeps the fewest bytes of those that may be offered, whatever the
        budget."""
        smaller = [kept for kept in self.search.tried if kept.within(self.request.max_drop)]
        judged = 0
        for kept in sorted(smaller, key=lambda kept: (kept.bytes, kept.loss)):
            if judged == FINALISTS:
                return None
            if self.offers.too_slow(kept) or self.offers.beyond.get(kept.steps):
                continue
            if not self.offers.why_not(kept):
                return kept
            judged += 1
        return None

    def _relaxation(self, near: Kept | None) -> Relaxation:
        """The smallest changes of the demands that would be met, of what was tried."""
        before = self.whole.bytes_per_token()
        allowed, wanted = f"--max-drop {percent(self.request.max_drop)}", percent(self.wanted)
        words, asked = f"nothing tried within {allowed} keeps less of the cache", None
        if near is not None:
            asked = math.ceil(1000 * near.bytes / before) / 1000
            words = f"--kv-bytes {percent(asked)} is met at {allowed}"
        fits = list(filter(self._fast, self.search.fits()))
        if not fits:
            keep = [kept.bytes for kept in self.search.tried if kept.bytes and self._fast(kept)]
            more = f"no plan tried keeps {wanted} and may be offered, the fewest bytes are"
            words = f"{words}; {more} {percent(min(keep, default=before) / before)}"
            return Relaxation(words, kv_bytes=asked)
        judged, most = self.offers.judged, self.request.max_drop
        told = [kept for kept in fits if kept.steps in judged or not kept.within(most)]
        least = min(told or fits, key=self.offers.upper)
        self.offers.why_not(least)  # a drop is no offer before it holds on evaluation data
        upper = self.offers.upper(least)
        if upper > most:
            needed, drop = say.allowing(upper)
            return Relaxation(f"{words}; {wanted} would take {needed}", max_drop=drop,
                              kv_bytes=asked)  # fmt: skip
        measured = filter(None, (least.accuracy, judged.get(least.steps)))
        why = next(filter(None, map(too_few, measured)), "no more plans were judged")
        words = f"{words}; {wanted} was not shown to be within it: {why}"
        return Relaxation(words, kv_bytes=asked)

    def _entry(self, built: Built, kept: Kept | None) -> CacheEntry:
        """What is told: the result against the exact plan, and every plan that was tried."""
        made = derive(built.program, check=False)
        timed = kept is not None and self.offers.timed
        step = self.offers.step(kept, made) if kept is not None and timed else None
        told = [
            PerLayer(v.kept.form, v.by, v.shares, _figure(v.uniform), _figure(v.kept), v.accepted)
            for v in self.varied
        ]
        return CacheEntry(
            self.wanted, self.whole.bytes_per_token(), made.bytes_per_token(), step,
            load_of(self.whole).words if timed else "",
            tuple(self._told(each, kept) for each in self.search.tried), tuple(told),
        )  # fmt: skip

    def _told(self, each: Kept, kept: Kept | None) -> CachePlan:
        if each.accuracy is None:
            return CachePlan(each.form, each.bytes or None, reason=each.reason)
        finite = math.isfinite(each.loss)
        taken = kept is not None and kept.steps == each.steps
        healed = self.healing is not None and self.healing.accepted
        done = "then healed; figures are before healing" if healed else ""
        return CachePlan(
            each.form, each.bytes,
            Number(each.bytes / self.whole.bytes_per_token(), "measured"),
            _figure(each) if finite else None,
            Number(each.accuracy.drop, "measured", high=each.accuracy.drop_upper)
            if finite else None,
            each.within(self.request.max_drop), self.offers.steps.get(each.steps), taken,
            done if taken else self._why_not(each, kept),
        )  # fmt: skip

    def _why_not(self, each: Kept, kept: Kept | None) -> str:
        """Why a plan that was measured is not the result."""
        assert each.accuracy is not None
        measured = (self.offers.slow, self.offers.beyond)
        known = [found[each.steps] for found in measured if found.get(each.steps)]
        if known or each.accuracy.reason:
            return known[0] if known else each.accuracy.reason
        if each.bytes > self.search.limits.bytes:
            return f"it keeps more than {percent(self.wanted)}"
        if not each.within(self.request.max_drop):
            return f"its drop may be beyond {percent(self.request.max_drop)}"
        if any(v.kept.steps == each.steps and not v.accepted for v in self.varied):
            return "its held-out loss does not drop against one size for all layers"
        if kept is None:
            return "it was not judged on the evaluation data"
        if loses_less(kept, each, self.bench.seed):
            return "it loses more"
        if self.least is not None and loses_less(self.least, each, self.bench.seed):
            return f"it loses more than {self.least.form}, which loses least"
        if each.bytes < kept.bytes:
            return "it was not judged on the evaluation data"
        stores = "more" if each.bytes > kept.bytes else "as much"
        return f"it stores {stores}, and does not surely lose less"


def _figure(kept: Kept) -> Number:
    nats = kept.accuracy is not None and kept.accuracy.kl is not None
    return Number(kept.loss, "measured", unit="nats/token" if nats else "")
