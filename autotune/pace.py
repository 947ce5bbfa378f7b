"""How fast a built plan is: raced against both baselines on the machine at hand, or estimated for a
device that is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnopt.autotune.baselines import COMPILED
from attnopt.autotune.number import Number
from attnopt.autotune.result import Speed, Timed
from attnopt.autotune.timing import Timing
from attnopt.autotune.workbench import Built, Workbench
from attnopt.codegen.roofline import estimate
from attnopt.codegen.target import Target
from attnopt.compiler.plan import Plan

EAGER_FORM, COMPILED_FORM = "optimized", "optimized, compiled"
MARGIN = 1.02  # how much faster a compiled form has to be to be worth its compilation
PATIENCE = 4  # times as long is timed again where the interval lies on both sides of the budget


@dataclass(frozen=True)
class Pace:
    """The speed of a built plan.

    `plan` is the plan with the form it runs in.
    """

    built: Built
    plan: Plan
    speed: Speed
    baselines: tuple[Timed, ...]
    optimized: Timed
    kind: str = "measured"
    warnings: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times as fast it is as the fastest baseline."""
        return self.speed.ratio.value


def measured(bench: Workbench, built: Built, seconds: float, budget: float | None = None) -> Pace:
    """Race the plan, eager and compiled, against the model as given and torch.compile of it.

    Where the interval of the ratio lies on both sides of `budget`, the race is run once more and
    longer; if it still does, the median decides and a warning says so.
    """
    forms: dict[str, Callable[..., Any]] = {EAGER_FORM: built.module}
    warnings: list[str] = []
    compiled, reason = bench.compiled(built)
    if compiled is None:
        warnings.append(f"the result could not be run under torch.compile: {reason}")
    else:
        forms[COMPILED_FORM] = compiled
    names = [c.name for c in bench.baselines.contenders]
    timing = bench.race(forms, seconds)
    form, speed = _speed(timing, names, bench.seed)
    if budget is not None and speed.straddles(budget):
        timing = bench.race(forms, PATIENCE * seconds)
        form, speed = _speed(timing, names, bench.seed)
        if speed.straddles(budget):
            warnings.append(
                f"the interval of the speed ({speed.ratio.low:.2f}x to {speed.ratio.high:.2f}x) "
                f"lies on both sides of {budget:g}x and the median decides; "
                "a machine with nothing else to do narrows it"
            )
    timed = [Timed.of(timing, name) for name in names]
    timed += [Timed(name, "left out", reason=why) for name, why in bench.baselines.left_out.items()]
    plan = replace(built.plan, compiled=form == COMPILED_FORM)
    return Pace(
        built,
        plan,
        speed,
        tuple(timed),
        Timed.of(timing, form, "optimized"),
        "measured",
        tuple(warnings),
    )


def _speed(timing: Timing, baselines: Sequence[str], seed: int) -> tuple[str, Speed]:
    """The form to run in, the compiled one where it is faster, and its ratios."""
    compiled = COMPILED_FORM in timing.samples
    worth = compiled and timing.ratio(COMPILED_FORM, EAGER_FORM).value > MARGIN
    form = COMPILED_FORM if worth else EAGER_FORM
    return form, Speed.of({name: timing.ratio(form, name, seed) for name in baselines})


def estimated(bench: Workbench, built: Built, target: Target) -> Pace:
    """Estimate the plan and the model as given by the target's roofline.

    Nothing is measured, and all of it says so.
    """
    note = f"estimated by a roofline of {target.title}"
    before = estimate(bench.program, target).seconds
    after = estimate(built.program, target).seconds
    ratio = Number(before / after, "estimated", note=note)
    verdict = "faster" if ratio.value > 1.0 else "inconclusive"
    timed = Timed("eager", "estimated", Number(before, "estimated", unit="s", note=note))
    left = Timed(
        COMPILED,
        "left out",
        reason="it is not estimated: torch.compile does not change what the roofline counts",
    )
    optimized = Timed("optimized", "estimated", Number(after, "estimated", unit="s", note=note))
    speed = Speed({"eager": ratio}, "eager", verdict)  # type: ignore[arg-type]
    warning = f"speeds are {note}: nothing was measured on it"
    return Pace(built, built.plan, speed, (timed, left), optimized, "estimated", (warning,))
