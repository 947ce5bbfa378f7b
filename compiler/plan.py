"""`Plan`: the rewrites of one optimization as text that replays without searching, and `Outcome`:
what each of them did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attnopt.compiler.contract import read_pass
from attnopt.compiler.errors import Problem

FORMAT = 1


@dataclass(frozen=True)
class Step:
    """One pass with its options as text, and the ids of its targets in order; ("*",) means all of
    its scope."""

    rewrite: str
    targets: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Plan:
    """An ordered list of steps.

    `compiled` says that the result runs under torch.compile (it measured faster).
    """

    steps: tuple[Step, ...] = ()
    compiled: bool = False

    def as_json(self) -> dict[str, Any]:
        """The plan as a JSON object; `Plan.from_json` reads it back."""
        return {
            "format": FORMAT,
            "steps": [{"rewrite": s.rewrite, "targets": list(s.targets)} for s in self.steps],
            "compiled": self.compiled,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """Read a plan; unknown passes, options or formats are a `Problem`."""
        if data.get("format") != FORMAT:
            raise Problem(
                "A501",
                f"plan format {data.get('format')!r} is not known",
                help=f"this version reads format {FORMAT}",
            )
        try:
            steps = tuple(Step(str(s["rewrite"]), tuple(s["targets"])) for s in data["steps"])
        except (KeyError, TypeError) as error:
            raise Problem("A501", "the plan has no readable `steps`", why=str(error)) from error
        for step in steps:
            read_pass(step.rewrite)
        return Plan(steps, bool(data.get("compiled", False)))

    def named(self) -> list[tuple[str, str]]:
        """Each rewrite with each target that the plan names for it."""
        return [
            (read_pass(step.rewrite).text, target)
            for step in self.steps
            for target in step.targets
            if target != "*"
        ]

    def then(self, rewrite: str, targets: Sequence[str] = ("*",)) -> Plan:
        """The plan with one more step."""
        return Plan((*self.steps, Step(rewrite, tuple(targets))), self.compiled)


@dataclass(frozen=True)
class Outcome:
    """What one pass did at one target.

    `error` is the measured max |difference| of an exact rewrite, relative to the root
    mean square of the outputs.
    """

    rewrite: str
    target: str
    exactness: str
    applied: bool
    reason: str = ""
    at: str = ""
    help: str = ""
    note: str = ""
    error: float | None = None
    evidence: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The outcome as a JSON object."""
        return asdict(self)


def require_applied(
    wanted: Iterable[tuple[str, str]], outcomes: Iterable[Outcome], home: Path
) -> None:
    """Raise `Problem` A512 unless every wanted rewrite was applied to its target."""
    found = {(outcome.rewrite, outcome.target): outcome for outcome in outcomes}
    for rewrite, target in wanted:
        outcome = found.get((rewrite, target))
        if outcome is None or not outcome.applied:
            raise Problem(
                "A512", f"`{rewrite}` does not apply to `{target}` of this model",
                where=outcome.at if outcome else "",
                why=outcome.reason if outcome else "the model has no such target",
                help=f"give the model that the plan in {home} was made for, "
                "or search again with optimize",
            )  # fmt: skip
