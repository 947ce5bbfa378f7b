"""The search under a budget of cache bytes: plans whose decoder keeps no more than a share of the
bytes per token, and what each of them loses on held-out data.

First every pass that shrinks the cache is tried with the same size at all layers, each followed by
the passes that heal; then the best of them with sizes of their own for each layer, in no more bytes
(`autotune.per_layer`). Where nothing within the budget stays within the bound on accuracy, larger
shares are tried with what plans and time are left, so that the report can say what would do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnopt.autotune.accuracy import Accuracy
from attnopt.autotune.order import approximate, healing
from attnopt.autotune.statistics import bootstrap
from attnopt.autotune.wording import share as percent
from attnopt.autotune.workbench import Workbench
from attnopt.compiler.contract import Pass, read_pass
from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.latents import Latent
from attnopt.compiler.errors import Problem
from attnopt.compiler.plan import Step

UNIFORM = 2 / 3  # of plans and time, for one size at all layers
LOOSER = (0.25, 0.5, 0.75)  # of the way to all bytes, where nothing within the budget will do


@dataclass(frozen=True)
class Kept:
    """One plan: what its decoder keeps of a token (bytes, and whether as latents), and its accuracy
    on held-out data; or the `reason` why there is none."""

    steps: tuple[Step, ...]
    bytes: int = 0
    latent: bool = False
    accuracy: Accuracy | None = None
    reason: str = ""

    @property
    def form(self) -> str:
        """The passes that shrink its cache, without those that heal."""
        names = {kind.name for kind in healing()}
        return "; ".join(
            step.rewrite + ("" if step.targets == ("*",) else f" @ {','.join(step.targets)}")
            for step in self.steps
            if step.rewrite.partition("{")[0] not in names
        )

    @property
    def loss(self) -> float:
        """KL divergence in nats per token; the drop where there is none. Infinite where it was not
        measured."""
        if self.accuracy is None or not self.accuracy.feasible:
            return math.inf
        return self.accuracy.drop if self.accuracy.kl is None else self.accuracy.kl

    def within(self, max_drop: float) -> bool:
        """Whether the bound on accuracy holds on held-out data."""
        return self.accuracy is not None and self.accuracy.verdict(max_drop) == "pass"


@dataclass(frozen=True)
class Limits:
    """When to stop: after `trials` plans, after `seconds`; `max_drop` bounds the loss, `bytes` what
    a token may keep."""

    bytes: int
    max_drop: float
    trials: int = 24
    seconds: float = 600.0


@dataclass
class CacheSearch:
    """One search; `tried` are its plans in order. `whole` is the decoder of the exact plan.
    `untold` says in words what was not tried, and why."""

    bench: Workbench
    whole: Decoder
    limits: Limits
    tried: list[Kept] = field(default_factory=list)
    untold: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    def uniform(self, may: Callable[[Kept], bool]) -> None:
        """Try every pass that shrinks the cache with one size for all layers. Where their part of
        plans and time runs out and none that fits `may` be offered, the rest is used for them
        too, up to the first one that may be."""
        part, left = UNIFORM, self._each(self.forms(self._share), UNIFORM)
        if left and not any(map(may, self.fits())):
            part, left = 1.0, self._each(left, 1.0, lambda kept: self._fit(kept) and may(kept))
        self._tell(f"{percent(self._share)} of the cache", left, part)

    def looser(self, may: Callable[[Kept], bool]) -> None:
        """Try the two passes that lose least, of those that `may` be offered, at larger shares,
        until a plan that may be is within the bound. Where nothing fits, all passes are tried."""
        fits = [kept for kept in sorted(self.fits(), key=by_loss) if may(kept)]
        names = list(dict.fromkeys(map(_name, fits)))[:2]

        def enough(kept: Kept) -> bool:
            return kept.within(self.limits.max_drop) and may(kept)

        before = len(self.tried)
        for part in LOOSER:
            share = self._share + part * (1 - self._share)
            forms = [form for form in self.forms(share) if not names or form.name in names]
            left = self._each(forms, 1.0, enough)
            if any(map(enough, self.tried[before:])):
                return
            self._tell(f"{percent(share)} of the cache and above", left)
            if left:
                return

    @property
    def _share(self) -> float:
        return self.limits.bytes / self.whole.bytes_per_token()

    def _each(
        self,
        forms: Iterable[Pass],
        part: float,
        enough: Callable[[Kept], bool] = lambda kept: False,
    ) -> list[Pass]:
        """Try one form after the other, until one is `enough` or this part of plans and time is
        used up; what is left then is returned."""
        left = list(forms)
        while left and self.goes_on(part):
            if enough(self.look([left.pop(0).text])):
                break
        return left

    def _tell(self, where: str, forms: Sequence[Pass], part: float = 1.0) -> None:
        """Say which forms were not tried, if any, and what ran out or sufficed."""
        names = ", ".join(dict.fromkeys(form.text for form in forms))
        if names:
            why = "another may be offered" if self.goes_on(part) else self.spent(part)
            self.untold.append(f"not tried at {where}: {names}: {why}")

    def forms(self, share: float) -> Iterator[Pass]:
        """The passes for a share of the cache, the first form of each, then the second of each."""
        program = self.bench.opened().original
        found = [kind.caching(program, share) for kind in approximate()]
        for at in range(max(map(len, found), default=0)):
            yield from (forms[at] for forms in found if at < len(forms))

    def goes_on(self, part: float = 1.0) -> bool:
        """Whether of this part of plans and time some are left; rewrites that do not apply are no
        plans."""
        spent = time.monotonic() - self.begun
        left = self._measurements < max(1, round(part * self.limits.trials))
        return left and spent < part * self.limits.seconds

    def spent(self, part: float = 1.0) -> str:
        """What ran out, in words."""
        share = "" if part == 1 else f" (of which {part:.0%} are for one size at all layers)"
        if self._measurements >= max(1, round(part * self.limits.trials)):
            return f"--trials {self.limits.trials} ran out{share}"
        return f"--timeout {self.limits.seconds:g}s ran out{share}"

    @property
    def _measurements(self) -> int:
        return sum(kept.accuracy is not None for kept in self.tried)

    def look(self, forms: Sequence[str | Step]) -> Kept:
        """Try a plan of these rewrites and of all that heal; the first time, it is measured."""
        steps = [form if isinstance(form, Step) else Step(form) for form in forms]
        asked = (*steps, *(Step(kind().text) for kind in healing()))
        known = next((kept for kept in self.tried if kept.steps == asked), None)
        if known is not None:
            return known
        kept = self._measured(asked)
        self.tried.append(kept)
        self.bench.progress("smaller caches", self._measurements / self.limits.trials)
        return kept

    def _measured(self, steps: tuple[Step, ...]) -> Kept:
        facts = self.bench.journal.get(
            f"cache {self.bench.compose(list(steps))}", lambda: _facts(self.bench, steps)
        )
        if facts["reason"]:
            return Kept(steps, reason=facts["reason"])
        latent = facts["latents"] > latents(self.whole)
        if facts["bytes"] >= self.whole.bytes_per_token():
            return Kept(steps, facts["bytes"], latent, reason="the cache is no smaller")
        return Kept(steps, facts["bytes"], latent, self.bench.drop(list(steps)))

    def fits(self) -> list[Kept]:
        """The plans whose loss was measured and that keep no more bytes than wanted."""
        return list(filter(self._fit, self.tried))

    def _fit(self, kept: Kept) -> bool:
        return kept.bytes <= self.limits.bytes and math.isfinite(kept.loss)

    def good(self) -> list[Kept]:
        """Those of them that are within the bound."""
        return [kept for kept in self.fits() if kept.within(self.limits.max_drop)]


def latents(decoder: Decoder) -> int:
    """How many of a decoder's caches hold latents."""
    return sum(isinstance(cache, Latent) for cache in decoder.caches.values())


def best(plans: Sequence[Kept], seed: int = 0) -> Kept:
    """The plan to take: of those that do not surely lose more than the one that loses least, the
    one that keeps the fewest bytes."""
    least = min(plans, key=by_loss)
    equal = [kept for kept in plans if kept is least or not loses_less(least, kept, seed)]
    return min(equal, key=lambda kept: (kept.bytes, kept.loss))


def loses_less(one: Kept, other: Kept, seed: int = 0) -> bool:
    """Whether a plan surely loses less than another: by a paired bootstrap over the held-out
    sequences; by the figures alone where there is none of each."""
    rows = [_rows(kept) for kept in (one, other)]
    if rows[0] is None or rows[1] is None:
        return one.loss < other.loss
    table = np.concatenate((rows[0], rows[1][:, 1:]), axis=1)

    def more(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        total = drawn.sum(-2)
        return np.asarray((total[..., 1] - total[..., 2]) / total[..., 0])

    return bootstrap(table, more, seed=seed).above < 0


def _rows(kept: Kept) -> NDArray[np.float64] | None:
    """Weight and loss of each held-out sequence, `[sequences, 2]`."""
    found = kept.accuracy.per_sequence if kept.accuracy else {}
    if "kl" in found:
        return np.stack([found["tokens"], found["kl"]], -1)
    if "cosine" in found:
        cosine = np.asarray(found["cosine"])
        return np.stack([np.ones_like(cosine), 1 - cosine], -1)
    return None


def _facts(bench: Workbench, steps: Sequence[Step]) -> dict[str, Any]:
    """What the decoder of a plan keeps, or why there is nothing to keep less of."""
    built = bench.build(list(steps), verify=False)
    first = read_pass(steps[0].rewrite).text
    told = [o for o in built.outcomes if o.rewrite == first]
    if not any(outcome.applied for outcome in told):
        return {"reason": told[0].reason if told else "it has no target"}
    try:
        decoder = derive(built.program, check=False)
    except Problem as problem:
        return {"reason": ": ".join(filter(None, (problem.what, problem.why)))}
    return {"reason": "", "bytes": decoder.bytes_per_token(), "latents": latents(decoder)}


def _name(kept: Kept) -> str:
    return kept.steps[0].rewrite.partition("{")[0]


def by_loss(kept: Kept) -> float:
    """The order of plans by what they lose."""
    return kept.loss
