"""Applying passes and plans: each exact rewrite is compared with the program before it, and rolled
back on a mismatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, Refused, Target, read_pass
from attnopt.compiler.faithful import faithful
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.plan import Outcome, Plan, Step
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.raising.blocks import carried
from attnopt.compiler.site import Site
from attnopt.compiler.trace import trace
from attnopt.compiler.verify import compare

Progress = Callable[[str], None]


def read(loaded: Loaded) -> Program:
    """Trace and raise a loaded model, and compare the outcome with the model."""
    traced = trace(loaded)
    return faithful(loaded, traced, raise_program(traced))


def apply_plan(
    program: Program, plan: Plan, notes: Notes, progress: Progress | None = None
) -> tuple[Program, list[Outcome]]:
    """Apply the steps of a plan in order; returns the new program and what happened at every
    target.

    What the opening of the plan leaves is the original that later steps are fitted to.
    """
    outcomes: list[Outcome] = []
    opened = opening(plan)
    for i, step in enumerate(plan.steps):
        if progress is not None:
            progress(step.rewrite)
        if i == opened:
            notes = replace(notes, original=program)
        later = replace(notes, healed=notes.healed or _trains(plan.steps[i + 1 :]))
        program, done = apply_pass(program, read_pass(step.rewrite), step.targets, later)
        outcomes += done
    return program, outcomes


def _trains(steps: Sequence[Step]) -> bool:
    return any(read_pass(step.rewrite).trains for step in steps)


def opening(plan: Plan) -> int:
    """How many steps come before the first that is approximate or takes the whole program at once.

    They leave the original's function, its nodes and its sites, and are faster to calibrate on.
    """
    for i, step in enumerate(plan.steps):
        rewrite = read_pass(step.rewrite)
        if rewrite.exactness is not Exactness.EXACT or rewrite.scope == "program":
            return i
    return len(plan.steps)


def apply_pass(
    program: Program, rewrite: Pass, targets: Sequence[str], notes: Notes, verify: bool = True
) -> tuple[Program, list[Outcome]]:
    """Apply one pass to the named targets (("*",) is all of its scope), one after the other.

    With `verify`, an exact or guarded pass is compared with the program before it, and what
    disagrees is rolled back.
    """
    chosen = [t for t in rewrite.targets(program) if "*" in targets or target_id(t) in targets]
    known = {target_id(t) for t in chosen}
    outcomes = [_missing(rewrite, name) for name in targets if name != "*" and name not in known]
    current = program
    applied: list[Outcome] = []
    for id in [target_id(t) for t in chosen]:
        current, outcome = _apply_one(current, rewrite, id, notes)
        (applied if outcome.applied else outcomes).append(outcome)
    if verify and applied and rewrite.exactness is not Exactness.APPROXIMATE:
        current, applied = _verified(program, current, rewrite, applied, notes)
    return current, [*outcomes, *applied]


def _apply_one(program: Program, rewrite: Pass, id: str, notes: Notes) -> tuple[Program, Outcome]:
    target = next((t for t in rewrite.targets(program) if target_id(t) == id), None)
    if target is None:
        return program, _outcome(rewrite, id, Miss("it went with an earlier rewrite of this pass"))
    answer = rewrite.rewrite(target, program, notes)
    if isinstance(answer, Miss):
        return program, _outcome(rewrite, id, answer)
    try:
        return apply_edit(program, target, answer), _outcome(rewrite, id, answer)
    except Refused as refusal:
        return program, _outcome(rewrite, id, refusal.miss)


def apply_edit(program: Program, target: Target, edit: Edit) -> Program:
    """A copy of the program with the edit made.

    Sites and sublayers whose nodes vanish are dropped.
    """
    made = program.copy()
    if edit.spec is not None:
        assert isinstance(target, Site)
        node = made.node(target.node)
        node.args = (*node.args[:4], edit.spec.text)
    for name, value in edit.weights.items():
        made.set_weight(name, value)
    if edit.graph is not None:
        edit.graph(made)
    made.clean()
    names = {node.name for node in made.graph.nodes}
    sites = [edit.sites.get(site.id, site) for site in made.sites]
    made.sites = tuple(site for site in sites if site.node in names)
    if edit.spec is not None and isinstance(target, Site):
        made.sites = tuple(
            replace(s, spec=edit.spec) if s.id == target.id else s for s in made.sites
        )
    made.sublayers = carried(made, made.sublayers)
    return made


def _verified(
    before: Program, after: Program, rewrite: Pass, applied: list[Outcome], notes: Notes
) -> tuple[Program, list[Outcome]]:
    """Compare; on a mismatch redo the targets one at a time and keep those that agree."""
    result = compare(before, after, rewrite.valid_only)
    if result.same:
        return after, [replace(outcome, error=result.error) for outcome in applied]
    if len(applied) == 1:
        return before, [_rolled_back(applied[0], result.error, result.bound)]
    current, kept = before, list[Outcome]()
    for outcome in applied:
        candidate, again = _apply_one(current, rewrite, outcome.target, notes)
        if not again.applied:
            kept.append(again)
            continue
        result = compare(before, candidate, rewrite.valid_only)
        if result.same:
            current = candidate
            kept.append(replace(again, error=result.error))
        else:
            kept.append(_rolled_back(again, result.error, result.bound))
    return current, kept


def _rolled_back(outcome: Outcome, error: float, bound: float) -> Outcome:
    reason = f"rolled back: outputs differ by {error:.1e} of their rms, {bound:.0e} is allowed"
    return replace(outcome, applied=False, reason=reason, error=error)


def _outcome(rewrite: Pass, id: str, answer: Edit | Miss) -> Outcome:
    base = Outcome(rewrite.text, id, rewrite.exactness.value, bool(answer))
    if isinstance(answer, Miss):
        return replace(base, reason=answer.reason, at=answer.at, help=answer.help)
    return replace(base, note=answer.note, evidence=dict(answer.evidence))


def _missing(rewrite: Pass, id: str) -> Outcome:
    return _outcome(rewrite, id, Miss(f"the program has no target `{id}`"))


def target_id(target: Target) -> str:
    """The id of a target; a program's is "program"."""
    return "program" if isinstance(target, Program) else target.id
