"""A cache with a size of its own for each layer, in no more bytes than one size for all takes.

What a layer loses at each size is told by the rewrite's own evidence (for a latent the energy that
its rank drops and the rotary it gives up); "measured sensitivity" weighs that with what the rewrite
costs at that layer alone. Plans by either are tried, and taken where held-out loss drops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnopt.autotune.cache_levels import Level, allot, tail
from attnopt.autotune.cache_search import CacheSearch, Kept
from attnopt.compiler.contract import read_pass
from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.caches import Ring
from attnopt.compiler.errors import Problem
from attnopt.compiler.plan import Step

TAIL, SENSITIVITY = "predicted tail", "measured sensitivity"
SIZES = (0.5, 0.75, 1.25, 1.5, 2.0)  # of the uniform share, that layers may have besides it


@dataclass(frozen=True)
class Varied:
    """A plan with sizes per layer beside the uniform one that it was made from; `by` says how, and
    `shares` what each site keeps of its cache."""

    uniform: Kept
    kept: Kept
    by: str
    shares: Mapping[str, float]

    @property
    def accepted(self) -> bool:
        """Whether it loses less in no more bytes."""
        return self.kept.loss < self.uniform.loss and self.kept.bytes <= self.uniform.bytes


def vary(search: CacheSearch, uniform: Kept) -> list[Varied]:
    """Try sizes per layer in the place of a uniform plan of one rewrite; none where the rewrite
    does not say what layers lose, or hangs together between layers. The search is told of what was
    not tried, and why."""
    levels = _levels(search, uniform)
    form = uniform.steps[0].rewrite
    base = {site: at for site, found in levels.items() for at in found if at.form == form}
    if len(base) < max(2, len(levels)):
        few = (
            "there is one layer"
            if len(levels) == 1
            else "it does not say of every layer what is lost there"
        )
        search.untold.append(f"sizes per layer were not tried for {form}: {few}")
        return []
    made: list[Varied] = []
    for by in (TAIL, SENSITIVITY):
        # Sketches of every layer cost more than the plan that is predicted: it comes first.
        found = levels if by == TAIL else _weighed(search, levels, base)
        tried = found if isinstance(found, str) else _tried(search, uniform, found, base, by)
        if isinstance(tried, Varied):
            made.append(tried)
        else:
            search.untold.append(f"sizes per layer by {by} were not tried for {form}: {tried}")
    return made


def _tried(
    search: CacheSearch, uniform: Kept, levels: Mapping[str, list[Level]],
    base: Mapping[str, Level], by: str,
) -> Varied | str:  # fmt: skip
    """The plan that these levels lead to, or why there is none to try."""
    chosen = allot(levels, sum(level.bytes for level in base.values()))
    if not search.goes_on():  # the levels may then lack sizes
        return search.spent()
    if all(level.form == base[site].form for site, level in chosen.items()):
        return "no others are predicted to lose less"
    full = {site: at.bytes for site, found in levels.items() for at in found if not at.form}
    shares = {site: at.bytes / full[site] for site, at in chosen.items()}
    return Varied(uniform, search.look(_steps(chosen)), by, shares)


def _steps(chosen: Mapping[str, Level]) -> list[Step]:
    """One step for each form, the largest size first; sites that are left alone have none."""
    forms: dict[str, list[str]] = {}
    for site, level in sorted(chosen.items(), key=lambda item: -item[1].bytes):
        if level.form:
            forms.setdefault(level.form, []).append(site)
    return [Step(form, tuple(sites)) for form, sites in forms.items()]


def _levels(search: CacheSearch, uniform: Kept) -> dict[str, list[Level]]:
    """The sizes that each site may have, itself untouched among them."""
    program = search.bench.opened().original
    rewrite = read_pass(uniform.steps[0].rewrite)
    share = search.limits.bytes / search.whole.bytes_per_token()
    forms = [form.text for form in rewrite.caching(program, share)]
    if rewrite.text not in forms:
        return {}
    at = forms.index(rewrite.text)
    found = {site: [Level("", held, 0.0)] for site, held in _held(search.whole).items()}
    wanted = [rewrite.text]
    for size in SIZES:
        more = rewrite.caching(program, size * share) if size * share < 1 else ()
        wanted += [form.text for form in more[at : at + 1]]
    for form in dict.fromkeys(wanted):
        if form != rewrite.text and not search.goes_on():
            break
        for site, (size, lost) in _told(search, form).items():
            if site in found:
                found[site].append(Level(form, size, lost))
    return found


def _told(search: CacheSearch, form: str) -> dict[str, list[float]]:
    """Bytes per token and predicted loss of a form, by site that it applies to and that keeps a
    cache of its own."""
    bench, steps = search.bench, [Step(form)]

    def measure() -> dict[str, Any]:
        built = bench.build(steps, verify=False)
        try:
            held = _held(derive(built.program, check=False))
        except Problem:
            return {}
        tails = {o.target: tail(o.evidence) for o in built.outcomes
                 if o.rewrite == form and o.applied}  # fmt: skip
        return {site: [held[site], lost] for site, lost in tails.items()
                if lost is not None and site in held}  # fmt: skip

    return dict(bench.journal.get(f"sizes {bench.compose(steps)}", measure))


def _held(decoder: Decoder) -> dict[str, float]:
    """Bytes per token of each site that keeps all tokens in a cache of its own."""
    found = decoder.bytes_by_attention()
    return {
        site.id: float(found[site.node])
        for site in decoder.program.sites
        if site.node in found and not isinstance(decoder.caches[site.node], Ring)
    }


def _weighed(
    search: CacheSearch, levels: Mapping[str, list[Level]], base: Mapping[str, Level]
) -> dict[str, list[Level]] | str:
    """The levels with predicted losses in nats: those of a site in proportion to what its uniform
    size costs there alone. Why not, where time does not last or a site alone breaks the model."""
    made: dict[str, list[Level]] = {}
    for site, level in base.items():
        if not search.goes_on():
            return search.spent()
        accuracy = search.bench.drop([Step(level.form, (site,))], sketch=True)
        cost = accuracy.drop if accuracy.kl is None else accuracy.kl
        if not math.isfinite(cost):  # times no loss at all it is not a number
            return f"{site} alone: {accuracy.reason or 'its loss is not finite'}"
        by = max(0.0, cost) / level.loss if level.loss > 0 else 0.0
        made[site] = [Level(at.form, at.bytes, at.loss * by) for at in levels[site]]
    return made
