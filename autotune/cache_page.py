"""The part of report.html that tells of a budget of cache bytes."""

from __future__ import annotations

from attnopt.autotune import cache_wording as words
from attnopt.autotune.cache_entry import CacheEntry
from attnopt.autotune.markup import Markup, table, tag


def section(entry: CacheEntry | None) -> Markup | None:
    """The section; None where no such budget was asked for."""
    if entry is None:
        return None
    plans = [(tag("code", plan), *rest) for plan, *rest in words.plans(entry)]
    layers = words.layers(entry)
    return tag(
        "section",
        tag("h2", "Cache"),
        tag("p", words.lead(entry), class_="muted"),
        table(words.FIGURES, words.figures(entry)),
        table(words.PLANS, plans) if plans else None,
        table(words.LAYERS, layers) if layers else None,
    )
