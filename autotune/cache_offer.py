"""Which plans with a smaller cache may be offered.

A plan has to be within the bound on the evaluation data too. One that caches latents is offered on
a CPU only where a decoding step of it is surely faster than the exact plan's, and not surely slower
than that of the best plan without latents: there the absorbed form costs more arithmetic than it
spares reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnopt.autotune.accuracy import Accuracy
from attnopt.autotune.cache_search import CacheSearch, Kept, by_loss
from attnopt.autotune.number import Number
from attnopt.autotune.step_time import load_of, race
from attnopt.autotune.wording import share as percent
from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.plan import Step

SECONDS = 3.0  # to time decoding steps against each other
EXACT, PLAN, GROUPED = "exact", "plan", "grouped"


@dataclass
class Offers:
    """What was timed and judged of the plans of a search: `slow` and `beyond` say of each that was
    asked for why not (empty: it may be offered), `steps` hold the ratios of those that were
    timed, `judged` the accuracy of those that were judged on the evaluation data."""

    search: CacheSearch
    slow: dict[tuple[Step, ...], str] = field(default_factory=dict)
    beyond: dict[tuple[Step, ...], str] = field(default_factory=dict)
    steps: dict[tuple[Step, ...], Number] = field(default_factory=dict)
    judged: dict[tuple[Step, ...], Accuracy] = field(default_factory=dict)

    @property
    def timed(self) -> bool:
        """Whether steps can be timed: on the machine at hand alone."""
        return self.search.bench.place.timed

    @property
    def warnings(self) -> list[str]:
        """Plans that were not taken for what was measured here, in words."""
        said = [*self.slow.items(), *self.beyond.items()]
        forms = {kept.steps: kept.form for kept in self.search.tried}
        return [f"{forms[steps]} was not taken: {why}" for steps, why in said if why]

    def why_not(self, kept: Kept) -> str:
        """Why a plan may not be the result; empty where it may."""
        return self.too_slow(kept) or self._judged(kept)

    def upper(self, kept: Kept) -> float:
        """The most that a plan may lose, by held-out and by evaluation data; infinite where one
        gives no bound."""
        judged = self.judged.get(kept.steps)
        return max(found.drop_upper for found in (kept.accuracy, judged) if found is not None)

    def too_slow(self, kept: Kept) -> str:
        """Why a plan with latents is not offered on this machine; empty where it is."""
        if not (kept.latent and self.timed):
            return ""
        if kept.steps not in self.slow:
            self.slow[kept.steps] = self._raced(kept)
        return self.slow[kept.steps]

    def step(self, kept: Kept, decoder: Decoder) -> Number:
        """How many times as fast a step of a plan is, by its decoder, as one of the exact plan;
        what was timed before is not timed again."""
        if kept.steps not in self.steps:
            found = self._ratios(kept, {EXACT: self.search.whole, PLAN: decoder})
            self.steps[kept.steps] = found[EXACT]
        return self.steps[kept.steps]

    def _raced(self, kept: Kept) -> str:
        other = min((k for k in self.search.good() if not k.latent), key=by_loss, default=None)
        decoders = {EXACT: self.search.whole, PLAN: self._decoder(kept)}
        if other is not None:
            decoders[GROUPED] = self._decoder(other)
        found = self._ratios(kept, decoders, other.form if other is not None else "")
        over = self.steps[kept.steps] = found[EXACT]
        if over.low is None or over.low <= 1:
            return f"a decoding step of it, uncompiled, runs at {_said(over)} of the exact plan's"
        beside = found.get(GROUPED)
        if other is None or beside is None or beside.high is None or beside.high >= 1:
            return ""
        return f"a decoding step of it, uncompiled, runs at {_said(beside)} of that of {other.form}"

    def _judged(self, kept: Kept) -> str:
        if kept.steps not in self.beyond:
            bench, most = self.search.bench, self.search.limits.max_drop
            accuracy = self.judged[kept.steps] = bench.verdict(bench.build(list(kept.steps)))
            verdict = accuracy.verdict(most)
            drops = "drops" if verdict == "fail" else "may drop"
            self.beyond[kept.steps] = "" if verdict == "pass" else (
                f"on the evaluation data it {drops} by {percent(accuracy.drop)}, at most "
                f"{percent(accuracy.drop_upper)}"
            )  # fmt: skip
        return self.beyond[kept.steps]

    def _decoder(self, kept: Kept) -> Decoder:
        built = self.search.bench.build(list(kept.steps), verify=False)
        return derive(built.program, check=False)

    def _ratios(
        self, kept: Kept, decoders: Mapping[str, Decoder], other: str = ""
    ) -> dict[str, Number]:
        """How many times as fast a step of a plan is as those of the exact plan and of the `other`,
        from the journal where known."""
        load, bench = load_of(self.search.whole), self.search.bench
        others = [name for name in decoders if name != PLAN]
        key = f"step {bench.compose(list(kept.steps))} over {EXACT} {other} on {load.words}"

        def measure() -> dict[str, list[float]]:
            timing = race(decoders, load, SECONDS, bench.progress)
            ratios = {name: timing.ratio(PLAN, name, bench.seed) for name in others}
            return {n: [r.value, r.interval.low, r.interval.high] for n, r in ratios.items()}

        note = f"a decoding step, {load.words}, uncompiled"
        found = bench.journal.get(key, measure)
        told = {name: map(float, found[name]) for name in others}
        return {n: Number(value, "measured", low, high, note=note)
                for n, (value, low, high) in told.items()}  # fmt: skip


def _said(number: Number) -> str:
    return f"{number.value:.2f}x ({number.low:.2f}x to {number.high:.2f}x)"
