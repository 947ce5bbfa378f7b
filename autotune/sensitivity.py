"""What each rewrite costs and gains at each target alone: measured once, it orders the targets and
warm-starts the search."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnopt.autotune.workbench import Workbench
from attnopt.compiler.contract import Pass
from attnopt.compiler.pipeline import target_id
from attnopt.compiler.plan import Step
from attnopt.compiler.profile import LEAST_CEILING, Profile, ceiling
from attnopt.compiler.program import Program
from attnopt.compiler.skip_order import greedy


@dataclass(frozen=True)
class Single:
    """One rewrite at one target alone.

    `drop` is infinite where it could not be applied or measured; `reason` says why.
    """

    rewrite: str
    target: str
    drop: float
    reason: str = ""


@dataclass(frozen=True)
class Menu:
    """One approximate pass as the search sees it: its targets, the least harmful first, and its
    ceiling (a factor)."""

    kind: type[Pass]
    targets: tuple[str, ...]
    ceiling: float
    share: float


def ceilings(
    program: Program, profile: Profile, kinds: Sequence[type[Pass]]
) -> dict[str, tuple[float, float]]:
    """Pass name -> (share of the measured time that the parts it can make cheaper take, Amdahl's
    ceiling of removing all of them)."""
    found: dict[str, tuple[float, float]] = {}
    for kind in kinds:
        targets = kind().targets(program)
        share = min(1.0, sum(profile.share(target_id(t), kind.removes) for t in targets))
        found[kind.name] = (share, ceiling(share))
    return found


def worthwhile(limit: float) -> bool:
    """Whether a ceiling justifies trying a pass at all."""
    return limit >= LEAST_CEILING


def singles(bench: Workbench, kind: type[Pass], seconds: float) -> list[Single]:
    """Measure a pass, as its `sketch`, at each of its targets alone on a part of the heldout data,
    until `seconds` are spent.

    Targets that the time did not reach get an infinite drop and say so.
    """
    rewrite = kind.sketch()
    begun = time.monotonic()
    found: list[Single] = []
    targets = [target_id(target) for target in rewrite.targets(bench.program)]
    for i, id in enumerate(targets):
        if time.monotonic() - begun > seconds:
            found.append(Single(rewrite.text, id, math.inf, "the time for sensitivities was spent"))
            continue
        found.append(_alone(bench, rewrite, id))
        bench.progress(f"sensitivity of {rewrite.name}", (i + 1) / len(targets))
    return found


def _alone(bench: Workbench, rewrite: Pass, id: str) -> Single:
    step = Step(rewrite.text, (id,))

    def measure() -> dict[str, Any]:
        outcomes = bench.build([step], verify=False).outcomes
        missed = [o.reason for o in outcomes if o.rewrite == rewrite.text and not o.applied]
        if missed:
            return {"drop": None, "reason": missed[0]}
        accuracy = bench.drop([step], sketch=True)
        return {"drop": accuracy.drop if accuracy.feasible else None, "reason": accuracy.reason}

    known = bench.journal.get(f"alone {step}", measure)
    return Single(
        rewrite.text, id, math.inf if known["drop"] is None else known["drop"], known["reason"]
    )


def menu(
    bench: Workbench,
    kind: type[Pass],
    found: Sequence[Single],
    share: float,
    limit: float,
    seconds: float,
) -> Menu:
    """The targets of a pass that can be used, least harmful first.

    For a greedy pass the order is found by taking one after the other, measuring again after each
    removal, until `seconds` are spent; what that did not reach follows in the order of the single
    drops.
    """
    usable = sorted((s for s in found if math.isfinite(s.drop)), key=lambda s: s.drop)
    order = [s.target for s in usable]
    if kind.greedy and len(order) > 1:
        first = _greedily(bench, order, seconds)
        order = first + [id for id in order if id not in first]
    return Menu(kind, tuple(order), limit, share)


def _greedily(bench: Workbench, candidates: list[str], seconds: float) -> list[str]:
    """The candidates in the order of greedy removal; the first half of them at most."""

    def measure() -> list[str]:
        begun, taken = time.monotonic(), list[str]()
        half = len(candidates) // 2
        notes = bench.opened()
        for choice in greedy(
            notes.original, notes, candidates, count=half, batches=bench.data.heldout
        ):
            taken.append(choice.id)
            bench.progress("greedy order of removal", len(taken) / max(1, half))
            if time.monotonic() - begun > seconds:
                break
        return taken

    return list(bench.journal.get(f"greedy {sorted(candidates)}", measure))
