"""How much of its cache each layer keeps, where all together may keep so many bytes.

Every site has levels, each with its bytes and a predicted loss. All start at the smallest; the step
up that spares most loss per byte is taken while it fits. Where losses fall ever more slowly with
bytes, as the tail of a spectrum does, no allotment of whole steps is better but for what the last
of them leaves over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Level:
    """What one form of a rewrite leaves of a site's cache (bytes per token), and the loss it is
    predicted to cost there. An empty `form` leaves the site alone."""

    form: str
    bytes: float
    loss: float


def allot(levels: Mapping[str, Sequence[Level]], most: float) -> dict[str, Level]:
    """A level for each site within `most` bytes in all; empty where even the smallest do not
    fit."""
    chosen = {site: min(found, key=lambda at: at.bytes) for site, found in levels.items()}
    left = most - sum(level.bytes for level in chosen.values())
    if left < 0:
        return {}
    while True:
        ups = [
            (_spared(chosen[site], level), site, level)
            for site, found in levels.items()
            for level in found
            if 0 < level.bytes - chosen[site].bytes <= left and level.loss < chosen[site].loss
        ]
        if not ups:
            return chosen
        _, site, level = max(ups, key=lambda up: up[0])
        left -= level.bytes - chosen[site].bytes
        chosen[site] = level


def tail(evidence: Mapping[str, float]) -> float | None:
    """What a rewrite says that a site loses: shares of energy on held-out data, or else as
    predicted, and of rotary energy what does not keep its rotary. None where it says nothing."""
    lost = [value for name, value in evidence.items() if name.endswith("heldout")]
    lost = lost or [value for name, value in evidence.items() if name.endswith("predicted")]
    if not lost:
        return None
    return sum(lost) + (1 - evidence.get("rotary_kept", 1.0))


def _spared(now: Level, up: Level) -> float:
    return (now.loss - up.loss) / (up.bytes - now.bytes)
