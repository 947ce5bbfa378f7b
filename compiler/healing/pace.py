"""How many tokens fit into a time: a few steps are timed, and the healing itself counts tokens, so
that it can be made again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from attnopt.compiler.healing import schedule
from attnopt.compiler.healing.heal import CHECKS, Healing
from attnopt.compiler.healing.settings import Settings

LOCAL_SHARE = 0.25  # of the tokens, or of the time


def by_tokens(settings: Settings, tokens: int) -> Settings:
    """The settings with this many tokens in all, a quarter of them for the local stage."""
    local = round(LOCAL_SHARE * tokens)
    return replace(settings, tokens=tokens - local, local=local)


def by_time(healing: Healing, seconds: float) -> Settings:
    """The settings of a healing that has not begun, with as many tokens as fit into the time.

    Timed are a step end to end, one at a site, and the held-out loss, whose checks are taken off
    first; each the faster of two, since a stall of the machine would leave no time for anything.
    Leaves the weights as they are. There is one step at least.
    """
    names = [name for mine in healing.names.values() for name in mine]
    optimizer = schedule.optimizer(healing.factors.groups(names))
    state = healing.factors.state()
    healing.step(optimizer, 0, 1)  # the first one also sets things up
    whole = _seconds(lambda: healing.step(optimizer, 0, 1))
    healing.factors.restore(state)
    check = _seconds(lambda: _one(healing.judge))
    ids = list(healing.names)
    middle = ids[len(ids) // 2]
    each = _seconds(lambda: healing.local.step(middle, healing.names[middle]))
    left = max(0.0, seconds - (CHECKS + 2) * check - len(ids) * check)
    return replace(
        healing.settings,
        tokens=max(healing.size, round((1 - LOCAL_SHARE) * left / whole)),
        local=round(LOCAL_SHARE * left / (len(ids) * each)) if each else 0,
    )


def _seconds(run: Callable[[], int]) -> float:
    """Seconds per token, the least of two runs; 0 for what took none."""
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        count = run()
        taken.append((time.perf_counter() - begun) / count if count else 0.0)
    return min(taken)


def _one(run: Callable[[], object]) -> int:
    run()
    return 1
