"""Expressions in index variables: what one element of a mask tensor is, as a function of its
position.

A number is a decision tree: `Where(condition, a, b)` over leaves that are `Affine` (integers: sums
of index variables, sizes and input values, plus a constant) or `Const` (reals). A condition is a
formula over `Compare` atoms, each an affine form compared with zero. Arithmetic and comparisons are
pushed down to the leaves when an expression is built, so every expression is a function of the
truth of finitely many affine comparisons: `mask_class` decides equality on that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.raising.evaluate import Unknown

LEAVES = (
    4096  # a decision tree with more leaves is not a mask that anybody wrote as an index expression
)


@dataclass(frozen=True)
class Datum:
    """One value of an input tensor, unknown at compile time: input name, index expressions, truth
    value or number, whole or real. A `computed` one is an element of the node with that name.
    """

    name: str
    index: tuple[Affine, ...]
    is_bool: bool
    is_real: bool = False
    computed: bool = False


Variable = str | Datum


@dataclass(frozen=True)
class Affine:
    """constant + sum of coefficient * variable, all integers. Terms are sorted and have no zero
    coefficient.
    """

    terms: tuple[tuple[Variable, int], ...] = ()
    constant: int = 0

    def plus(self, other: Affine, times: int = 1) -> Affine:
        """self + times * other."""
        total = dict(self.terms)
        for variable, coefficient in other.terms:
            total[variable] = total.get(variable, 0) + times * coefficient
        terms = sorted(((v, c) for v, c in total.items() if c), key=lambda term: str(term[0]))
        return Affine(tuple(terms), self.constant + times * other.constant)

    def scaled(self, times: int) -> Affine:
        """times * self."""
        return Affine().plus(self, times)


@dataclass(frozen=True)
class Const:
    """A truth value or a real number."""

    value: bool | float


@dataclass(frozen=True)
class Compare:
    """`form` compared with zero; `op` is one of lt, le, eq, ne, gt, ge."""

    op: str
    form: Affine


@dataclass(frozen=True)
class Logic:
    """and, or, xor of two conditions, or not of one."""

    op: str
    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Where:
    """`yes` where the condition holds, else `no`."""

    condition: Condition
    yes: Expression
    no: Expression
    leaves: int = field(compare=False, default=2)


Condition = Const | Compare | Logic | Where
Expression = Const | Compare | Logic | Where | Affine
TRUE, FALSE = Const(True), Const(False)
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("lt", "le", "eq", "ne", "gt", "ge")
}


def variable(name: Variable) -> Affine:
    """A variable as an affine form."""
    return Affine(((name, 1),))


def number(value: float | bool) -> Expression:
    """A Python number as an expression: integers are affine, truth values and reals constants."""
    if isinstance(value, bool) or not isinstance(value, int):
        return Const(value)
    return Affine((), value)


def is_condition(x: Expression) -> bool:
    """Whether an expression is a truth value."""
    if isinstance(x, Where):
        return is_condition(x.yes)
    return isinstance(x, (Compare, Logic)) or (isinstance(x, Const) and isinstance(x.value, bool))


def where(condition: Expression, yes: Expression, no: Expression) -> Expression:
    """`yes` where the condition holds, else `no`. Raises Unknown when the tree gets too large."""
    chosen = truth(condition)
    if isinstance(chosen, Const):
        return yes if chosen.value else no
    if yes == no:
        return yes
    leaves = sum(x.leaves if isinstance(x, Where) else 1 for x in (yes, no))
    if leaves > LEAVES:
        raise Unknown("the mask has too many cases")
    return Where(chosen, yes, no, leaves)


def map_leaves(function: Callable[..., Expression], *parts: Expression) -> Expression:
    """Apply a function of leaves to decision trees, pushing it down to their leaves."""
    for at, part in enumerate(parts):
        if isinstance(part, Where):
            yes = map_leaves(function, *parts[:at], part.yes, *parts[at + 1 :])
            no = map_leaves(function, *parts[:at], part.no, *parts[at + 1 :])
            return where(part.condition, yes, no)
    return function(*parts)


def truth(x: Expression) -> Condition:
    """An expression as a truth value: a number counts as true when it is not zero."""
    made = map_leaves(_truth, x) if not is_condition(x) else x
    assert not isinstance(made, Affine)
    return made


def numeric(x: Expression) -> Expression:
    """An expression as a number: true is 1, false is 0."""
    return where(x, number(1), number(0)) if is_condition(x) else x


def add(x: Expression, y: Expression, times: int | float = 1) -> Expression:
    """x + times * y."""
    return map_leaves(lambda a, b: _add(a, _multiply(number(times), b)), numeric(x), numeric(y))


def multiply(x: Expression, y: Expression) -> Expression:
    """x * y, where one of them is constant at every leaf."""
    return map_leaves(_multiply, numeric(x), numeric(y))


def divide(x: Expression, by: float) -> Expression:
    """x / by, where x is a constant at every leaf."""

    def quotient(leaf: Expression) -> Expression:
        value = _plain(leaf)
        if value is None or not by:
            raise Unknown("a position is divided into real numbers")
        return Const(value / by)

    return map_leaves(quotient, numeric(x))


def compare(op: str, x: Expression, y: Expression) -> Condition:
    """x op y for op in lt, le, eq, ne, gt, ge."""
    return truth(map_leaves(lambda a, b: _compare(op, a, b), numeric(x), numeric(y)))


def both(*parts: Expression) -> Condition:
    """All conditions hold."""
    joined: Condition = TRUE
    for part in parts:
        joined = logic("and", joined, part)
    return joined


def negate(x: Expression) -> Condition:
    """The condition does not hold."""
    part = truth(x)
    if isinstance(part, Const):
        return Const(not part.value)
    return Logic("not", (part,))


def logic(op: str, x: Expression, y: Expression) -> Condition:
    """x and y, x or y, x xor y, with constants folded."""
    a, b = truth(x), truth(y)
    if isinstance(a, Const):
        a, b = b, a
    if not isinstance(b, Const):
        return Logic(op, (a, b))
    if op == "xor":
        return negate(a) if b.value else a
    absorbing = op == "or"
    return b if b.value is absorbing else a


def evaluate(x: Expression, values: Mapping[Variable, Tensor]) -> Tensor:
    """The expression at points given as broadcastable int64 tensors per variable: bool, int64 or
    float64.
    """
    if isinstance(x, Const):
        return torch.tensor(
            x.value, dtype=torch.bool if isinstance(x.value, bool) else torch.float64
        )
    if isinstance(x, Affine):
        total = torch.tensor(x.constant)
        for name, coefficient in x.terms:
            total = total + coefficient * values[name]
        return total
    if isinstance(x, Compare):
        made: Tensor = COMPARISONS[x.op](evaluate(x.form, values), 0)
        return made
    if isinstance(x, Where):
        condition, yes, no = (evaluate(p, values) for p in (x.condition, x.yes, x.no))
        return torch.where(condition, yes, no)
    parts = [evaluate(part, values) for part in x.parts]
    if x.op == "not":
        return ~parts[0]
    return {"and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor}[x.op](
        *parts
    )


def atoms(x: Expression) -> set[Compare]:
    """All comparisons in an expression."""
    if isinstance(x, Compare):
        return {x}
    if isinstance(x, Where):
        return atoms(x.condition) | atoms(x.yes) | atoms(x.no)
    return set().union(*(atoms(part) for part in x.parts)) if isinstance(x, Logic) else set()


def leaves(x: Expression) -> set[Expression]:
    """The values that a decision tree can take."""
    return leaves(x.yes) | leaves(x.no) if isinstance(x, Where) else {x}


def _truth(x: Expression) -> Expression:
    if isinstance(x, Const):
        return Const(bool(x.value))
    return _compare("ne", x, Affine()) if isinstance(x, Affine) else x


def _plain(x: Expression) -> float | None:
    """The value of a constant leaf, or None."""
    if isinstance(x, Const):
        return x.value
    return x.constant if isinstance(x, Affine) and not x.terms else None


def _add(x: Expression, y: Expression) -> Expression:
    if isinstance(x, Affine) and isinstance(y, Affine):
        return x.plus(y)
    a, b = _plain(x), _plain(y)
    if a is None or b is None:
        raise Unknown("a real number is added to a position")
    return Const(float(a + b))


def _multiply(x: Expression, y: Expression) -> Expression:
    a, b = _plain(x), _plain(y)
    if a is not None and b is not None:
        exact = isinstance(x, Affine) and isinstance(y, Affine)
        return number(int(a * b)) if exact else Const(float(a * b))
    form, factor = (x, b) if a is None else (y, a)
    if not isinstance(form, Affine) or factor is None or factor != int(factor):
        raise Unknown("a position is multiplied by another or by a real number")
    return form.scaled(int(factor))


def _compare(op: str, x: Expression, y: Expression) -> Expression:
    a, b = _plain(x), _plain(y)
    if a is not None and b is not None:
        return Const(bool(COMPARISONS[op](a, b)))
    forms = [Affine((), int(p)) if p is not None and _whole(p) else e for p, e in ((a, x), (b, y))]
    if not all(isinstance(form, Affine) for form in forms):
        raise Unknown("a position is compared with a real number")
    difference = forms[0].plus(forms[1], -1)  # type: ignore[union-attr,arg-type]
    if not difference.terms:
        return Const(bool(COMPARISONS[op](difference.constant, 0)))
    return Compare(op, difference)


def _whole(value: float) -> bool:
    return abs(value) < 2**53 and value == int(value)
