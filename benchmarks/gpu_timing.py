"""Paired timing on a GPU: each round runs every contender once, on the same set of inputs, in an
order that turns; the sets rotate, so that none of them lies in the L2 cache when a round begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from attnopt.autotune.timing import rotated

_ASLEEP = 4_000_000  # cycles, about two milliseconds
Run = Callable[[], Any]
Clock = Callable[[Run], float]
"""Runs once and gives the seconds that the device took."""


@dataclass(frozen=True)
class Times:
    """Seconds by contender; sample i of each is of round i."""

    samples: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """The contender's median, in seconds."""
        return median(self.samples[name])

    def ratio(self, fast: str, slow: str) -> tuple[float, float, float]:
        """How many times as fast the first is as the second: the median over the rounds, and the
        first and ninth tenth of them."""
        pairs = zip(self.samples[slow], self.samples[fast], strict=True)
        found = sorted(there / here for there, here in pairs)
        tenth = len(found) // 10
        return median(found), found[tenth], found[-1 - tenth]

    def fastest(self, names: Sequence[str]) -> str:
        """Which of these has the smallest median."""
        return min(names, key=self.median)


def cuda_clock(run: Run) -> float:
    """Seconds between two events around one call on the current stream. The device sleeps first, so
    that the call is queued whole by the time it begins: what the host takes is not counted."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_ASLEEP)
    begun.record()
    run()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3


def times(
    contenders: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Any],
    rounds: int = 30,
    clock: Clock = cuda_clock,
) -> Times:
    """Time contenders, each called with one element of `inputs`.

    One round for each input goes before, two at least, unmeasured: they compile, and fill what is
    kept between calls.
    """
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for at in range(-max(2, len(inputs)), rounds):
        given = inputs[at % len(inputs)]
        for name in rotated(names, at):
            taken = clock(partial(contenders[name], given))
            if at >= 0:
                samples[name].append(taken)
    return Times({name: tuple(taken) for name, taken in samples.items()})


def sets_beyond(l2: int, bytes_per_set: float, most: int = 8) -> int:
    """How many sets of inputs together exceed three times the L2 cache, two at least."""
    return max(2, min(most, int(3 * l2 // max(bytes_per_set, 1.0)) + 1))
