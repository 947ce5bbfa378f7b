"""`inspect --why`: what is understood of one attention and what is not, each at the line of the
model's own source that made the node in the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from attnopt.autotune.order import ordered
from attnopt.compiler.contract import Exactness, Miss, Notes, Pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.excerpt import Excerpt, excerpt
from attnopt.compiler.inspect import Inspection
from attnopt.compiler.intake.weightless import is_weightless
from attnopt.compiler.nearest_miss import mend, steps, written
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.plan import Outcome
from attnopt.compiler.program import Program
from attnopt.compiler.site import Site, Unraised
from attnopt.compiler.stack import frames, own

Severity = Literal["error", "warning", "note"]
_HELP = {
    "mask": "a mask is proved when it is made of comparisons of positions (`key <= query`) and of "
    "an input; one that is not stays a tensor, and no rewrite relies on it",
    "rotary": "keep the rotation linear in q and k; models in bfloat16 are probed with "
    "--dtype float32",
    "out": "rewrites of the heads need one projection behind the attention; the others do not",
}
_PROJECTION = "rewrites of the heads need one projection per operand; the others do not"


@dataclass(frozen=True)
class Diagnostic:
    """One thing that was not understood or does not apply: what, where, how far matching got, and
    how to mend it.

    `node` is the guilty node of the graph, `excerpt` the source that made it.
    """

    severity: Severity
    code: str
    what: str
    node: str = ""
    excerpt: Excerpt | None = None
    notes: tuple[str, ...] = ()
    help: str = ""

    def as_json(self) -> dict[str, Any]:
        """The diagnostic as a JSON object."""
        return {
            "severity": self.severity, "code": self.code, "what": self.what, "node": self.node,
            "source": None if self.excerpt is None else self.excerpt.as_json(),
            "notes": list(self.notes), "help": self.help,
        }  # fmt: skip


@dataclass(frozen=True)
class Explanation:
    """All that `--why` says of one attention. `row` is its row of the inspection, `passes` what
    each pass with its defaults answers on it."""

    row: dict[str, Any]
    diagnostics: tuple[Diagnostic, ...]
    passes: tuple[Outcome, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """The explanation as a JSON object."""
        return {
            "site": self.row,
            "diagnostics": [told.as_json() for told in self.diagnostics],
            "passes": [
                {"pass": o.rewrite, "exactness": o.exactness, "applies": o.applied,
                 "target": o.target, "why": o.note if o.applied else o.reason, "node": o.at,
                 "help": o.help}
                for o in self.passes
            ],
        }  # fmt: skip


def explain(found: Inspection, wanted: str) -> Explanation:
    """Explain the attention `wanted`: an id, a module path, or a part of one that names no other.

    Raises `Problem` A215 for one that is not there.
    """
    row = _row(found, wanted)
    program = found.program
    if not row["raised"]:
        unraised = program.unraised[int(row["id"].removeprefix("u"))]
        return Explanation(row, (_left_alone(program, unraised, row),))
    site = program.site(row["id"])
    outcomes = tuple(_answers(program, site, weightless=_weightless(found)))
    told = [_not_found(program, site, fact, why) for fact, why in site.missing.items()]
    if not told:
        node = program.node(site.node)
        notes = (written(node), f"found: {', '.join(_found(program, site))}", *_calls(node))
        what = f"attention {site.id} ({site.module}) is understood"
        told.append(Diagnostic("note", "", what, site.node, excerpt(node), notes))
    shown = {site.node, *(diagnostic.node for diagnostic in told)}
    for outcome in outcomes:
        if _exact(outcome) and not outcome.applied and outcome.target == site.id:
            guilty = program.find(outcome.at)
            if guilty is not None and guilty.name not in shown:
                told.append(_refused(site, outcome, guilty))
                shown.add(guilty.name)
    return Explanation(row, tuple(told), outcomes)


def _row(found: Inspection, wanted: str) -> dict[str, Any]:
    by_id = [row for row in found.sites if row["id"] == wanted]
    by_path = [row for row in found.sites if row["module"] == wanted]
    by_part = [row for row in found.sites if wanted and wanted in row["module"]]
    chosen = by_id or by_path or by_part
    if len(chosen) == 1:
        return chosen[0]
    shown = ", ".join(f"{row['id']} ({row['module']})" for row in (chosen or found.sites)[:12])
    more = len(chosen or found.sites) - 12
    what = f"{len(chosen)} attentions match" if chosen else "there is no attention"
    raise Problem(
        "A215",
        f"{what} `{wanted}` in {found.program.name}",
        why="" if found.sites else "no softmax of it looks like one",
        help=f"{'' if not chosen else 'give one of them by its id; '}known: {shown}"
        f"{f' and {more} more' if more > 0 else ''}" if found.sites else "",
    )  # fmt: skip


def _weightless(found: Inspection) -> bool:
    return any(is_weightless(weight) for weight in found.program.module.parameters())


def _left_alone(program: Program, found: Unraised, row: dict[str, Any]) -> Diagnostic:
    node = program.find(found.node)
    at = f" ({found.module})" if found.module else ""
    return Diagnostic(
        "error", "A210", f"attention {row['id']}{at} is left alone: {found.reason}", found.node,
        None if node is None else excerpt(node),
        (*steps(program, found), *_calls(node)), mend(program, found),
    )  # fmt: skip


def _not_found(program: Program, site: Site, fact: str, why: str) -> Diagnostic:
    """One fact that the probes did not find."""
    named = [node for name in re.findall(r"`([^`]+)`", why) if (node := program.find(name))]
    operands = dict(zip("qkv", program.node(site.node).args[:3], strict=True))
    guilty = named[0] if named else operands.get(fact, program.node(site.node))
    assert isinstance(guilty, fx.Node)
    notes = [written(node) for node in named or [guilty]]
    found = "proved" if fact == "mask" else "found"
    if fact == "mask":
        seen = (
            f"the mask looks like `{site.mask}` at the sizes that were tried, which proves nothing"
        )
        notes.append(seen if site.mask != "tensor" else "it stays a tensor, of no known class")
    else:
        notes.append(f"found: {', '.join(_found(program, site)) or 'nothing of q, k, v and out'}")
    return Diagnostic(
        "warning", "A211",
        f"{fact} of attention {site.id} ({site.module}) was not {found}: {why}",
        guilty.name, excerpt(guilty), (*notes, *_calls(guilty)), _HELP.get(fact, _PROJECTION),
    )  # fmt: skip


def _found(program: Program, site: Site) -> Iterator[str]:
    """The projections that were found."""
    for name, path in (("q", site.q), ("k", site.k), ("v", site.v), ("out", site.out)):
        if path is not None:
            way = "into" if name == "out" else "from"
            yield f"{name} {way} `{path.weight.removeprefix(program.prefix)}`"


def _refused(site: Site, outcome: Outcome, node: fx.Node) -> Diagnostic:
    """An exact pass that another node than the attention's own keeps from applying."""
    name = outcome.rewrite.partition("{")[0]
    what = f"{name} does not apply to attention {site.id}: {outcome.reason}"
    return Diagnostic("note", "", what, node.name, excerpt(node), (written(node),), outcome.help)


def _calls(node: fx.Node | None) -> tuple[str, ...]:
    """Says which `forward` called the line that is shown, and which of torch's it called."""
    shown = None if node is None else own(node)
    if node is None or shown is None:
        return ()
    forwards = [call for call in frames(node) if call.function == "forward"]
    users = [call for call in forwards if not call.in_torch]
    told = []
    if users and users[-1] != shown:
        told.append(f"called from {users[-1]}, in forward")
    if forwards and forwards[-1].in_torch and forwards[-1] != shown:
        told.append(f"below it torch's own module ran: {forwards[-1]}")
    return tuple(told)


def _exact(outcome: Outcome) -> bool:
    return outcome.exactness != Exactness.APPROXIMATE.value


def _answers(program: Program, site: Site, weightless: bool) -> Iterator[Outcome]:
    """What each pass with its defaults answers on a site, in the order in which they run.

    Exact rewrites of the site are made on a copy, for what comes after them. What reads weights is
    not asked where there are none.
    """
    current = program
    for kind in ordered():
        rewrite = kind()
        exact = kind.exactness is not Exactness.APPROXIMATE
        if weightless and not exact:
            continue
        notes = Notes(program)
        if kind.scope == "site" and exact:
            current, outcomes = apply_pass(current, rewrite, [site.id], notes, verify=False)
            yield from outcomes
            continue
        for target in _targets(rewrite, current, site):
            yield _asked(rewrite, target, current, notes)


def _targets(rewrite: Pass, program: Program, site: Site) -> list[Any]:
    """The targets of a pass that a site is or is part of."""
    if rewrite.scope == "sublayer":
        return [layer for layer in program.sublayers if site.id in layer.sites]
    return [s for s in program.sites if s.id == site.id] if rewrite.scope == "site" else [program]


def _asked(rewrite: Pass, target: Any, program: Program, notes: Notes) -> Outcome:
    answer = rewrite.rewrite(target, program, notes)
    id = "program" if isinstance(target, Program) else target.id
    if isinstance(answer, Miss):
        return Outcome(rewrite.text, id, rewrite.exactness.value, False, reason=answer.reason,
                       at=answer.at, help=answer.help)  # fmt: skip
    return Outcome(rewrite.text, id, rewrite.exactness.value, True, note=answer.note)
