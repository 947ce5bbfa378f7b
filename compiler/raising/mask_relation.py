"""Masks that compare query and key by what is known of each: documents of a packed sequence, chunks
of the positions, order by given positions.

A comparison of f(i) with f(j), for a function f of one token that is not looked into, becomes a
truth value of its own. Whatever is then proved for every such value holds for the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.raising.expression import (
    Affine,
    Compare,
    Condition,
    Datum,
    Expression,
    Logic,
    Where,
    map_leaves,
    negate,
    numeric,
    truth,
    variable,
    where,
)

CHUNK = "//"
_ORDER = {"ge": "ge", "le": "le", "lt": "ge", "gt": "le"}  # what it is, or the opposite of


@dataclass(frozen=True)
class Relation:
    """f(i) `op` f(j), for op "eq", "ge" or "le", as the truth value `holds`."""

    name: str
    op: str

    @property
    def holds(self) -> Condition:
        """The relation as a condition of its own."""
        return truth(variable(Datum(f"{self.op} {self.name}", (), True, computed=True)))

    def __str__(self) -> str:
        if self.name.startswith(CHUNK):
            return f"chunk({self.name.removeprefix(CHUNK)})"
        return f"document({self.name})" if self.op == "eq" else f"order({self.name})"


def chunk(x: Expression, size: int) -> Expression:
    """floor(x / size), as values that are only compared with their like."""

    def one(leaf: Expression) -> Expression:
        if not isinstance(leaf, Affine):
            raise Unknown("a real number is divided")
        if not leaf.terms:
            return Affine((), leaf.constant // size)
        return variable(Datum(f"{CHUNK}{size}", (leaf,), False, computed=True))

    return map_leaves(one, numeric(x))


def related(keep: Condition) -> tuple[Condition, tuple[Relation, ...]]:
    """The condition with every comparison of f(i) and f(j) replaced, and the relations in it."""
    found: dict[Relation, None] = {}
    made = truth(_replaced(keep, found))
    return made, tuple(found)


def _replaced(x: Expression, found: dict[Relation, None]) -> Expression:
    if isinstance(x, Compare):
        return _relation(x, found)
    if isinstance(x, Logic):
        return Logic(x.op, tuple(truth(_replaced(part, found)) for part in x.parts))
    if isinstance(x, Where):
        condition, yes, no = (_replaced(part, found) for part in (x.condition, x.yes, x.no))
        return where(truth(condition), yes, no)
    return x


def _relation(x: Compare, found: dict[Relation, None]) -> Condition:
    data = [(name, factor) for name, factor in x.form.terms if isinstance(name, Datum)]
    if len(data) != 2 or len(x.form.terms) != 2 or x.form.constant:
        return x
    if sorted(factor for _, factor in data) != [-1, 1]:
        return x
    (ours, sign), (theirs, _) = data
    if ours.name != theirs.name:
        return x
    if not _mirrored(ours, theirs):
        (ours, theirs), sign = (theirs, ours), -sign
    if not _mirrored(ours, theirs):
        return x
    if x.op in ("eq", "ne"):
        relation, opposite = Relation(ours.name, "eq"), x.op == "ne"
    else:
        op = x.op if sign == 1 else {"ge": "le", "le": "ge", "lt": "gt", "gt": "lt"}[x.op]
        relation, opposite = Relation(ours.name, _ORDER[op]), op in ("lt", "gt")
    found[relation] = None
    return negate(relation.holds) if opposite else relation.holds


def _mirrored(ours: Datum, theirs: Datum) -> bool:
    """Whether one value stands at the query, of its own sequence, where the other stands at the
    key."""
    return any(
        (ours.index, theirs.index) == ((*batch, variable("i")), (*batch, variable("j")))
        for batch in ((), (variable("b"),))
    )
