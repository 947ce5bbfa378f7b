"""Deciding which mask class an index expression is, for every length at once.

An expression is a function of the truth of comparisons  x - y <= c  and  x <= c  (also <, =, and so
on) of the query position i, the key position j and, where they occur, sizes. Two such functions are
equal for all integers i, j >= 0 when they agree on one point of every non-empty cell of the
arrangement of these comparisons, both functions' together. A cell is a system of difference
constraints over the unknowns and a node for zero. Because every unknown is at least 0, a feasible
system has a least solution, and it is a negated shortest-path distance: a path without repeated
nodes, so each coordinate is a sum of at most as many edge weights as there are unknowns
(Bellman-Ford; Cormen et al., Introduction to Algorithms, section "Difference constraints and
shortest paths"). Edge weights are c - 1, c or c + 1 up to sign. So it is enough to compare on the
grid of all such sums; that is what `agree` does, and it is a proof. Values of inputs may be
compared with constants only; each is tried below, at and above every constant, and an input of real
numbers half-way to its neighbours besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.raising.expression import (
    Affine,
    Compare,
    Condition,
    Const,
    Datum,
    Expression,
    Logic,
    Variable,
    atoms,
    both,
    evaluate,
    leaves,
    variable,
)
from attnopt.compiler.spec import CAUSAL, FULL, Mask

POINTS = 1 << 23  # more points than this and the class is not decided
_OPPOSITE = {"lt": "ge", "le": "gt", "eq": "ne", "ne": "eq", "gt": "le", "ge": "lt"}
_COARSE = 24


class Classless(Unknown):
    """The mask is understood, and it is proved to be in none of the classes."""


@dataclass(frozen=True)
class Padding:
    """Keys dropped by an input: a key is read where the input's value compares with `value` by
    `op`.
    """

    datum: Datum
    op: str
    value: int


def keep_of(mask: Mask) -> Condition:
    """A mask class as an expression in i and j."""
    offset = variable("i").plus(variable("j"), -1)
    if mask.kind == "full":
        return Const(True)
    causal = Compare("ge", offset)
    if mask.kind == "causal":
        return causal
    near: Condition = both(
        Compare("lt", offset.plus(Affine((), -mask.left))),
        Compare("gt", offset.plus(Affine((), mask.left))),
    )
    if mask.sink:
        near = Logic("or", (near, Compare("lt", variable("j").plus(Affine((), -mask.sink)))))
    return both(causal, near) if mask.causal else near


def decide(
    keep: Condition, sizes: tuple[Affine, Affine], besides: Sequence[Condition] = ()
) -> tuple[Mask, Padding | None]:
    """The mask class and the padding that equal `keep` together with the conditions `besides`,
    proved. Raises Classless, or Unknown with what stands in the way of a decision.

    `sizes` are the numbers of queries and keys as affine forms: i < sizes[0] and j < sizes[1] are
    known.
    """
    for padding in (None, *_paddings(keep)):
        dropped = [] if padding is None else [_reads(padding)]
        for mask in candidates(keep):
            if agree(keep, both(keep_of(mask), *dropped, *besides), sizes):
                return mask, padding
    raise Classless("it is none of full, causal, window and window with sinks, padded or not")


def prefix(
    keep: Condition, sizes: tuple[Affine, Affine], besides: Sequence[Condition] = ()
) -> tuple[str, Padding | None] | None:
    """The keys that every query reads in a mask that is causal for all others, as "prefix(8)" or
    "prefix(input)", and the padding, proved; or None."""
    own = (variable("b"), variable("j"))
    tests = [
        (f"prefix({p.datum.name})", _reads(p)) for p in _paddings(keep) if p.datum.index == own
    ]
    for atom in atoms(keep):
        if {name for name, _ in atom.form.terms} == {"j"}:
            for end in (abs(atom.form.constant) + d for d in (0, 1)):
                near = Compare("lt", variable("j").plus(Affine((), -end)))
                tests.append((f"prefix({end})", near))
    for padding in (None, *_paddings(keep)):
        dropped = [] if padding is None else [_reads(padding)]
        for word, test in tests:
            open_to = Logic("or", (keep_of(CAUSAL), test))
            if agree(keep, both(open_to, *dropped, *besides), sizes):
                return word, padding
    return None


def candidates(keep: Expression) -> list[Mask]:
    """The classes that an expression may be, from the constants in it; simple ones first."""
    lefts, sinks = {0}, {0}
    for atom in atoms(keep):
        near = {abs(atom.form.constant) + d for d in (-1, 0, 1)}
        names = {name for name, _ in atom.form.terms}
        if names == {"i", "j"}:
            lefts |= near
        if names == {"j"}:
            sinks |= near
    found = [FULL, CAUSAL]
    for sink in sorted(s for s in sinks if s >= 0):
        for left in sorted(c for c in lefts if c > 0):
            found += [Mask("window", left, sink, causal) for causal in (True, False)]
    return found


def agree(a: Condition, b: Condition, sizes: tuple[Affine, Affine]) -> bool:
    """Whether two conditions on (i, j), sizes and input values are equal wherever i and j are in
    range. A proof.
    """
    everything = atoms(a) | atoms(b)
    _check(everything)
    names = _unknowns(everything)
    bounds = [variable(n).plus(size, -1) for n, size in zip(("i", "j"), sizes, strict=True)]
    inside = [Compare("lt", form) for form in bounds if _among(form, names)]
    coarse = _points(everything, inside, names, _COARSE)
    if coarse is not None and not _equal(a, b, inside, coarse):
        return False
    fine = _points(everything, inside, names, None)
    if fine is None:
        raise Unknown("the mask has too many constants to compare it everywhere")
    return _equal(a, b, inside, fine)


def constant_value(x: Expression) -> int | float | bool | None:
    """The one value that an expression has at every position, or None."""
    values = leaves(x)
    if any(isinstance(v, Affine) and v.terms for v in values):
        return None
    if len(values) == 1:
        (only,) = values
        return only.constant if isinstance(only, Affine) else only.value  # type: ignore[union-attr]
    everything = atoms(x)
    _check(everything)
    points = _points(everything, [], _unknowns(everything), None)
    if points is None:
        return None
    made = evaluate(x, points)
    first = made.flatten()[0]
    return first.item() if bool((made == first).all()) else None


def _equal(
    a: Condition, b: Condition, inside: Sequence[Compare], points: dict[Variable, Tensor]
) -> bool:
    differ = evaluate(a, points) ^ evaluate(b, points)
    for bound in inside:
        differ = differ & evaluate(bound, points)
    return not bool(differ.any())


def _paddings(keep: Condition) -> list[Padding]:
    """Tests of one input value against a number that occur in the expression, and their opposites;
    "!= 0" first.
    """
    found: set[Padding] = set()
    for atom in atoms(keep):
        if len(atom.form.terms) != 1 or not isinstance(atom.form.terms[0][0], Datum):
            continue
        ((datum, coefficient),) = atom.form.terms
        if abs(coefficient) != 1 or not isinstance(datum, Datum):
            continue
        if datum.computed:
            continue
        flipped = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
        op = atom.op if coefficient == 1 else flipped.get(atom.op, atom.op)
        value = -atom.form.constant * coefficient
        found |= {Padding(datum, o, value) for o in (op, _OPPOSITE[op])}
    return sorted(found, key=lambda p: (p.op != "ne" or p.value != 0, p.op, p.value, str(p.datum)))


def _reads(padding: Padding) -> Condition:
    return Compare(padding.op, variable(padding.datum).plus(Affine((), -padding.value)))


def _check(found: Iterable[Compare]) -> None:
    """Every comparison must be one unknown, or a difference of two, against a constant."""
    for atom in found:
        signs = sorted(coefficient for _, coefficient in atom.form.terms)
        if signs not in ([1], [-1], [-1, 1]):
            raise Unknown("it compares something else than a difference of positions")
        data = [v for v, _ in atom.form.terms if isinstance(v, Datum)]
        if data and len(signs) > 1:
            raise Unknown(
                f"it compares values of the input `{data[0].name}` with positions or each other"
            )


def _unknowns(found: Iterable[Compare]) -> list[Variable]:
    names: set[Variable] = {"i", "j"}
    for atom in found:
        names |= {name for name, _ in atom.form.terms}
    return sorted(names, key=str)


def _among(form: Affine, names: Sequence[Variable]) -> bool:
    """Whether a bound speaks of the unknowns: it has a size among them, or is a plain number."""
    return all(name in names for name, _ in form.terms)


def _on_positions(atom: Compare) -> bool:
    return not any(isinstance(name, Datum) for name, _ in atom.form.terms)


def _points(
    found: Iterable[Compare],
    inside: Sequence[Compare],
    names: Sequence[Variable],
    limit: int | None,
) -> dict[Variable, Tensor] | None:
    """The grid that decides equality (see the module docstring), or None when it is too large.

    With a `limit` it is thinned to that many values per unknown, which can refute but not prove.
    """
    positions = [name for name in names if isinstance(name, str)]
    constants = {a.form.constant for a in (*found, *inside) if _on_positions(a)} | {0}
    weights = sorted({s * (c + d) for c in constants for d in (-1, 0, 1) for s in (1, -1)})
    sums, total = {0}, {0}
    for _ in positions:
        sums = {s + w for s in sums for w in weights}
        total |= sums
        if len(total) > POINTS:
            return None
    values = sorted(s for s in total if s >= 0)
    if limit is not None and len(values) > limit:
        values = values[:: -(-len(values) // limit)]
    grids: list[Sequence[float]] = []
    for name in names:
        grids.append(values if isinstance(name, str) else _data_values(name, found))
    count = 1
    for grid in grids:
        count *= len(grid)
    if count > POINTS:
        return None
    made: dict[Variable, Tensor] = {}
    for place, (name, grid) in enumerate(zip(names, grids, strict=True)):
        shape = [1] * len(names)
        shape[place] = len(grid)
        made[name] = torch.tensor(grid).reshape(shape)
    return made


def _data_values(name: Variable, found: Iterable[Compare]) -> Sequence[float]:
    assert isinstance(name, Datum)
    if name.is_bool:
        return [0, 1]
    used = {a.form.constant for a in found if any(v == name for v, _ in a.form.terms)}
    steps = (-1, -0.5, 0, 0.5, 1) if name.is_real else (-1, 0, 1)
    return sorted({s * (c + d) for c in used for d in steps for s in (1, -1)})
