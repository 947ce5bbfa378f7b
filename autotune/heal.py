"""Healing the plan that a run chose: how many tokens fit into the time, the plan with that step,
and what it did, measured on evaluation data, which decides neither what is trained nor what of it
is kept (but which plan wins)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnopt.autotune.accuracy import Accuracy
from attnopt.autotune.number import Number
from attnopt.autotune.request import HealBudget
from attnopt.autotune.result import AccuracyEntry, HealingEntry
from attnopt.autotune.workbench import Built, Workbench
from attnopt.compiler.contract import Miss
from attnopt.compiler.healing.heal import start
from attnopt.compiler.healing.pace import by_time, by_tokens
from attnopt.compiler.healing.settings import Settings
from attnopt.compiler.plan import Outcome, Plan, Step
from attnopt.passes.heal import Heal


@dataclass(frozen=True)
class HealedPlan:
    """A plan with a step that heals it, its accuracy on the evaluation data, and what is told."""

    built: Built
    accuracy: Accuracy
    entry: HealingEntry


def healed(bench: Workbench, steps: list[Step], asked: HealBudget, before: Accuracy) -> HealedPlan:
    """Heal approximate steps together with the exact ones that go before a healing.

    `before` is their accuracy on the evaluation data without it. A time becomes a number of tokens
    once, which the journal keeps, so that an interrupted run goes on with the same step.
    """
    rewrite = Heal(rank=asked.rank)
    bench.progress("healing: timing its steps", 0.0)
    made = _sized(bench, steps, asked, rewrite)
    if isinstance(made, Miss):
        entry = HealingEntry(False, rewrite.text, made.reason)
        return HealedPlan(bench.build(steps), before, entry)
    built = bench.build([*steps, Step(made.text)])
    outcome = next(o for o in built.outcomes if o.rewrite == made.text)
    if not outcome.applied:
        return HealedPlan(built, before, HealingEntry(False, made.text, outcome.reason))
    after = bench.verdict(built)
    return HealedPlan(built, after, _entry(outcome, made, before, after))


def _sized(bench: Workbench, steps: list[Step], asked: HealBudget, rewrite: Heal) -> Heal | Miss:
    """The pass with as many tokens as were asked for, or fit into the time."""
    if asked.tokens:
        return _with(rewrite, by_tokens(rewrite.settings(bench.seed), asked.tokens))
    plan = bench.compose([*steps, Step(rewrite.text)])
    at = next(i for i, step in enumerate(plan.steps) if step.rewrite == rewrite.text)
    program = bench.apply(Plan(plan.steps[:at])).program
    notes = bench.opened()
    begun = start(
        program, notes.original, notes.training or notes.calibration, notes.heldout,
        rewrite.settings(bench.seed),
    )  # fmt: skip
    if isinstance(begun, Miss):
        return begun
    key = f"heal {asked.seconds:g} s {rewrite.text} {plan.as_json()}"
    tokens, local = bench.journal.get(key, lambda: _counts(by_time(begun, asked.seconds)))
    return replace(rewrite, tokens=int(tokens), local=int(local))


def _with(rewrite: Heal, settings: Settings) -> Heal:
    return replace(rewrite, tokens=settings.tokens, local=settings.local)


def _counts(settings: Settings) -> list[int]:
    return [settings.tokens, settings.local]


def _entry(outcome: Outcome, made: Heal, before: Accuracy, after: Accuracy) -> HealingEntry:
    told = outcome.evidence
    unit = "nats/token" if before.perplexity is not None else ""
    first, last = (AccuracyEntry.of(accuracy, 0.0, False) for accuracy in (before, after))
    return HealingEntry(
        True, made.text, "",
        Number(told["loss_before"], "measured", unit=unit),
        Number(told["loss_after"], "measured", unit=unit),
        last.metric, last.original, first.optimized, last.optimized, first.drop, last.drop,
        int(told["trained_tokens"]), int(told["trained_numbers"]), int(told["sites"]), made.rank,
        Number(told["seconds"], "measured", unit="s"),
    )  # fmt: skip
