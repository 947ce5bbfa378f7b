"""How the figures of a budget of cache bytes are put into words: the same in report.md, report.html
and the terminal."""

from __future__ import annotations

from attnopt.autotune import wording as say
from attnopt.autotune.cache_entry import CacheEntry, CachePlan

FIGURES = ("cache of a decoder", "before", "after")
PLANS = ("plan", "bytes per token", "loss, held-out", "drop, held-out", "a step", "")
LAYERS = ("sizes per layer", "what each site keeps", "loss, one size", "loss, these sizes", "")


def lead(entry: CacheEntry) -> str:
    """What was asked for, and what the figures are of."""
    timed = ""
    if entry.timed:
        timed = f" Steps were timed in turns after {entry.timed}, uncompiled."
    return (
        f"At most {say.share(entry.wanted)} of the bytes were asked for. Bytes are counted from "
        f"the caches of the derived decoder; before is with exact rewrites alone.{timed}"
    )


def figures(entry: CacheEntry) -> list[tuple[str, str, str]]:
    """Bytes per token and the time of a step, in the columns of `FIGURES`."""
    rows = [
        ("bytes per token", say.bytes_of(entry.before), say.bytes_of(entry.after)),
        ("share", "100%", say.share(entry.share)),
    ]
    if entry.step is not None:
        rows.append(("a step, uncompiled, times as fast", "1×", say.times(entry.step)))
    return rows


def plans(entry: CacheEntry) -> list[tuple[str, ...]]:
    """The plans that were held against the budget, in the columns of `PLANS`."""
    return [
        (
            plan.plan,
            _bytes(plan),
            say.plain(plan.loss),
            _drop(plan),
            say.times(plan.step),
            ", ".join(filter(None, ("taken", plan.reason))) if plan.kept else plan.reason,
        )
        for plan in entry.plans
    ]


def layers(entry: CacheEntry) -> list[tuple[str, ...]]:
    """Sizes per layer against one size for all, in the columns of `LAYERS`."""
    return [
        (
            f"by {tried.by}",
            ", ".join(f"{site} {say.share(part)}" for site, part in tried.shares.items()),
            say.plain(tried.uniform),
            say.plain(tried.loss),
            "better" if tried.accepted else "not taken",
        )
        for tried in entry.per_layer
    ]


def terminal(entry: CacheEntry) -> list[tuple[str, str]]:
    """The lines of a verdict: name and figures."""
    kept = say.share(entry.share)
    before, after = say.bytes_of(entry.before), say.bytes_of(entry.after)
    told = [("cache", f"{after} per token, {kept} of {before}; {say.share(entry.wanted)} asked")]
    if entry.step is not None:
        told.append((
            "step",
            f"{say.times(entry.step)} as fast as the exact plan's, uncompiled, after {entry.timed}",
        ))  # fmt: skip
    for tried in entry.per_layer:
        better = "lower" if tried.accepted else "no lower, not taken"
        told.append((
            "per layer",
            f"by {tried.by}: held-out loss {say.plain(tried.loss)}, one size for all "
            f"{say.plain(tried.uniform)}: {better}",
        ))  # fmt: skip
    return told


def _bytes(plan: CachePlan) -> str:
    if plan.bytes is None:
        return say.NONE
    part = f" ({say.percent(plan.share)})" if plan.share is not None else ""
    return f"{plan.bytes:,}{part}"


def _drop(plan: CachePlan) -> str:
    if plan.drop is None or plan.drop.high is None:
        return say.percent(plan.drop)
    return f"{say.percent(plan.drop)}, at most {say.share(plan.drop.high)}"
