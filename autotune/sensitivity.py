"""What each rewrite costs and gains at each target alone: measured once, it orders the targets and warm-starts the search."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.autotune.accuracy import Accuracy
from attnopt.autotune.workbench import Workbench
from attnopt.compiler.contract import Miss, Pass
from attnopt.compiler.pipeline import target_id
from attnopt.compiler.plan import Step
from attnopt.compiler.profile import LEAST_CEILING, Profile, ceiling
from attnopt.compiler.program import Program


@dataclass(frozen=True)
class Single:
    """One rewrite at one target alone. `drop` is infinite where it could not be applied or measured; `reason` says why."""

    rewrite: str
    target: str
    drop: float
    reason: str = ""
    accuracy: Accuracy | None = None


@dataclass(frozen=True)
class Menu:
    """One approximate pass as the search sees it: its targets, the least harmful first, and its ceiling (a factor)."""

    kind: type[Pass]
    targets: tuple[str, ...]
    ceiling: float
    share: float


def ceilings(program: Program, profile: Profile, kinds: Sequence[type[Pass]]) -> dict[str, tuple[float, float]]:
    """Pass name -> (share of measured time its targets have, Amdahl's ceiling of removing all of it)."""
    found: dict[str, tuple[float, float]] = {}
    for kind in kinds:
        share = min(1.0, sum(profile.share(target_id(t)) for t in kind().targets(program)))
        found[kind.name] = (share, ceiling(share))
    return found


def worthwhile(limit: float) -> bool:
    """Whether a ceiling justifies trying a pass at all."""
    return limit >= LEAST_CEILING


def singles(bench: Workbench, kind: type[Pass], seconds: float) -> list[Single]:
    """Measure a pass with its default options at each of its targets alone, until `seconds` are spent.

    Targets that the time did not reach get an infinite drop and say so.
    """
    rewrite = kind()
    begun = time.monotonic()
    found: list[Single] = []
    base = bench.build([]).program
    targets = [target_id(t) for t in rewrite.targets(base)]
    for i, id in enumerate(targets):
        target = next(t for t in rewrite.targets(base) if target_id(t) == id)
        if time.monotonic() - begun > seconds:
            found.append(Single(rewrite.text, id, math.inf, "the time for sensitivities was spent"))
            continue
        answer = rewrite.rewrite(target, base, bench.notes)
        if isinstance(answer, Miss):
            found.append(Single(rewrite.text, id, math.inf, answer.reason))
            continue
        accuracy = bench.drop([Step(rewrite.text, (id,))])
        drop = accuracy.drop if accuracy.feasible else math.inf
        found.append(Single(rewrite.text, id, drop, accuracy.reason, accuracy))
        bench.progress(f"sensitivity of {rewrite.name}", (i + 1) / len(targets))
    return found


def menu(kind: type[Pass], found: Sequence[Single], share: float, limit: float) -> Menu:
    """The targets of a pass that can be used, least harmful first."""
    usable = sorted((s for s in found if math.isfinite(s.drop)), key=lambda s: s.drop)
    return Menu(kind, tuple(s.target for s in usable), limit, share)
