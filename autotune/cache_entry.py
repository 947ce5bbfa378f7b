"""What a run says about a budget of cache bytes: which plans were held against it, and what was
kept.

Bytes are those that a token of one sequence takes in the caches of the derived decoder, counted
from their shapes. "Before" is the plan of exact rewrites alone, where key/value heads that the
model repeats are cached once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from attnopt.autotune.number import Number


def most_bytes(share: float, before: int) -> int:
    """How many whole bytes a share of them is; 29% of 100 are 29, though in float64 they are a
    little less."""
    return math.floor(share * before + 1e-6)


@dataclass(frozen=True)
class CachePlan:
    """One plan held against a budget of cache bytes: bytes per token, their `share` of those
    before, and on held-out data the `loss` (KL divergence, or the drop where there is none) and the
    `drop` with its bound as high.

    `step` is how many times as fast its decoding step is as that of the exact plan, where it was
    timed, uncompiled. `kept` says that it is the result, `reason` why it is not, or what was done
    with it after these figures.
    """

    plan: str
    bytes: int | None = None
    share: Number | None = None
    loss: Number | None = None
    drop: Number | None = None
    within: bool = False
    step: Number | None = None
    kept: bool = False
    reason: str = ""


@dataclass(frozen=True)
class PerLayer:
    """Sizes per layer in the place of one for all, in no more bytes.

    `by` says what they were allotted by, `shares` what each site keeps of its cache. Held-out
    `loss` of the uniform plan and of this one; `accepted` where it falls.
    """

    plan: str
    by: str
    shares: Mapping[str, float]
    uniform: Number
    loss: Number
    accepted: bool


@dataclass(frozen=True)
class CacheEntry:
    """Bytes of cache per token before and after, the share that was `wanted`, and the plans that
    were held against it.

    `step` is how many times as fast a decoding step of the result is as that of the exact plan,
    uncompiled; `timed` says at what size.
    """

    derived: ClassVar[tuple[str, ...]] = ("share", "met")
    wanted: float
    before: int
    after: int
    step: Number | None = None
    timed: str = ""
    plans: tuple[CachePlan, ...] = ()
    per_layer: tuple[PerLayer, ...] = ()

    @property
    def share(self) -> float:
        """Bytes after over bytes before."""
        return self.after / self.before

    @property
    def met(self) -> bool:
        """Whether no more bytes are kept than wanted."""
        return self.after <= most_bytes(self.wanted, self.before)
