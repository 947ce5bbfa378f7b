"""The parts of a `Result` made from what a run found: sites, ceilings, sensitivities, trials, the
relaxation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attnopt.autotune import wording
from attnopt.autotune.accuracy import LEAST_SEQUENCES, Accuracy
from attnopt.autotune.number import Number
from attnopt.autotune.pace import Pace
from attnopt.autotune.result import (
    Ceiling,
    Refit,
    Relaxation,
    Sensitivity,
    SiteEntry,
    SublayerEntry,
    Trial,
    Workload,
)
from attnopt.autotune.search import Tried, front, shown
from attnopt.autotune.sensitivity import Single
from attnopt.compiler.cost import Cost
from attnopt.compiler.decode.phase_cost import Decoding, Load, decoding_or_why
from attnopt.compiler.plan import Outcome
from attnopt.compiler.profile import Profile, ceiling
from attnopt.compiler.program import Program
from attnopt.compiler.site import Site

_RATIO_NOTE = "gain over the exact plan times its ratio over the baseline"


def facts(site: Site, cost: Cost | None = None, profile: Profile | None = None) -> dict[str, Any]:
    """What `inspect` and the report say of a site; shares are fractions of the whole model."""
    spec = site.spec
    found: dict[str, Any] = {
        "heads": spec.heads, "kv_heads": site.kv_heads, "head_dim": spec.head_dim,
        "v_dim": spec.v_dim, "scale": spec.scale * site.gain, "mask": site.mask,
        "mask_certainty": site.mask_certainty, "position": site.position, "qk_norm": site.qk_norm,
        "spelling": site.spelling,
        "exactness": "exact" if site.mask_certainty == "proved" else "guarded", "spec": spec.text,
    }  # fmt: skip
    if site.missing:
        found["missing"] = dict(site.missing)
    if cost is not None:
        found |= {"params": cost.site_params.get(site.id, 0), "flops_share": cost.share(site.id)}
    if profile is not None:
        found["time_share"] = profile.share(site.id)
    return found


def sites(
    program: Program, outcomes: Sequence[Outcome], cost: Cost | None, profile: Profile | None
) -> tuple[SiteEntry, ...]:
    """One entry per attention, raised or not; rewrites of the whole program count for every
    site."""
    made = [
        SiteEntry(site.id, site.module, site.source, True, facts=facts(site, cost, profile),
                  **_outcomes(outcomes, site.id, "program"))
        for site in program.sites
    ]  # fmt: skip
    made += [
        SiteEntry(f"u{i}", u.module, u.source, False, u.reason, u.node, u.help)
        for i, u in enumerate(program.unraised)
    ]
    return tuple(made)


def sublayers(program: Program, outcomes: Sequence[Outcome]) -> tuple[SublayerEntry, ...]:
    """One entry per residual branch."""
    return tuple(
        SublayerEntry(s.id, s.kind, s.block, s.module, **_outcomes(outcomes, s.id))
        for s in program.sublayers
    )


def _outcomes(outcomes: Sequence[Outcome], *ids: str) -> dict[str, Any]:
    mine = [o for o in outcomes if o.target in ids]
    return {
        "applied": tuple(o.rewrite for o in mine if o.applied),
        "refused": tuple(o for o in mine if not o.applied),
    }


def ceilings(found: Mapping[str, tuple[float, float]]) -> tuple[Ceiling, ...]:
    """Per pass: the share of the measured time it could remove, and Amdahl's ceiling."""
    return tuple(_ceiling(name, share, limit) for name, (share, limit) in found.items())


def decoding(before: Program, after: Program, load: Workload) -> dict[str, Decoding]:
    """What decoding costs before and after the rewrites, on prompts of the workload's length;
    nothing where one of them is no causal language model."""
    wanted = Load(load.batch, load.length, load.length)
    found = {
        name: decoding_or_why(program, wanted)
        for name, program in (("before", before), ("after", after))
    }
    told = {name: each for name, each in found.items() if isinstance(each, Decoding)}
    return told if len(told) == len(found) else {}


def attention_ceiling(profile: Profile) -> Ceiling:
    """The most that making all attention free could gain, projections included."""
    share = profile.attention_share
    return _ceiling("all attention, projections included", share, ceiling(min(share, 1.0)))


def _ceiling(what: str, share: float, limit: float) -> Ceiling:
    speedup = limit if math.isfinite(limit) else 1e6
    return Ceiling(
        what, Number(share, "measured"), Number(speedup, "measured", note="1 / (1 - share)")
    )


def sensitivities(found: Sequence[Single]) -> tuple[Sensitivity, ...]:
    """One entry per rewrite and target measured alone."""
    return tuple(
        Sensitivity(
            s.rewrite,
            s.target,
            Number(s.drop, "measured") if math.isfinite(s.drop) else None,
            s.reason,
        )
        for s in found
    )


def trials(
    tried: Sequence[Tried], base: float, chosen: Tried | None, kind: Any = "measured"
) -> tuple[Trial, ...]:
    """The plans tried; `base` is the exact plan's ratio over the fastest baseline."""
    best = front(tried)
    return tuple(
        Trial(
            t.number, shown(t.steps), t.feasible,
            Number(t.gain * base, kind, note=_RATIO_NOTE) if t.gain else None,
            Number(t.drop, "measured", high=t.drop_upper) if math.isfinite(t.drop) else None,
            t.tier, t.number in best, chosen is not None and t.number == chosen.number, t.reason,
        )
        for t in tried
    )  # fmt: skip


def relaxation(
    tried: Sequence[Tried], base: float, budget: float | None, pace: Pace, max_drop: float,
    accuracy: Accuracy | None,
) -> Relaxation:  # fmt: skip
    """The smallest change of the demands that would be met, from what was measured (or, for a
    device that is not there, estimated)."""
    kept = accuracy is None or accuracy.verdict(max_drop) == "pass"
    allowed = wording.share(max_drop)
    rounded = math.floor(pace.ratio * 100) / 100
    by = "" if pace.kind == "measured" else f" ({pace.kind})"
    words = f"--budget {rounded:.2f}x is met at --max-drop {allowed}{by}"
    if not kept:
        assert accuracy is not None
        words, rounded = _loss_words(accuracy), 0.0
    elif pace.speed.verdict != "faster" or rounded <= 1:
        words, rounded = (
            f"nothing within --max-drop {allowed} is surely faster than {pace.speed.best}",
            1.0,
        )
    if budget is None or not tried:
        return Relaxation(words, budget=rounded or None)
    fast = [t for t in tried if t.gain * base >= budget and math.isfinite(t.drop_upper)]
    over = [t for t in fast if t.drop_upper > max_drop]
    if not fast:
        return Relaxation(f"{words}; no plan tried reaches {budget:g}x", budget=rounded or None)
    if not over:
        more = "a plan that seemed to was slower when it was timed again, or the data too little"
        return Relaxation(f"{words}; {more}", budget=rounded or None)
    needed, drop = wording.allowing(min(t.drop_upper for t in over))
    return Relaxation(f"{words}; {budget:g}x would take {needed}", rounded or None, drop)


def _loss_words(accuracy: Accuracy) -> str:
    return too_few(accuracy) or f"it would take {wording.allowing(accuracy.drop_upper)[0]}"


def too_few(accuracy: Accuracy) -> str:
    """That a loss was measured on too few sequences to bound it; empty where it was not."""
    if not (accuracy.feasible and accuracy.bounded and accuracy.sequences < LEAST_SEQUENCES):
        return ""
    return (
        f"{accuracy.sequences} sequences are too few to bound a loss: "
        f"give data for at least {LEAST_SEQUENCES}"
    )


def refits(outcomes: Sequence[Outcome]) -> tuple[Refit, ...]:
    """Held-out error of each healed output before and after."""
    return tuple(
        Refit(o.target, o.evidence["heldout_before"], o.evidence["heldout_after"], o.applied)
        for o in outcomes
        if {"heldout_before", "heldout_after"} <= set(o.evidence)
    )
