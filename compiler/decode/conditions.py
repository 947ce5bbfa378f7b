"""What a compiled graph takes for granted of the sizes that it is called with."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational

Relation = Callable[[float, float], bool]
_RELATIONS: dict[type[Relational], Relation] = {
    sympy.StrictLessThan: operator.lt, sympy.LessThan: operator.le, sympy.Equality: operator.eq,
    sympy.StrictGreaterThan: operator.gt, sympy.GreaterThan: operator.ge,
    sympy.Unequality: operator.ne,
}  # fmt: skip


class Conditions:
    """The conditions that torch.compile has put on the whole numbers among a graph's inputs.

    `inputs` are those that a backend is given, with symbols in place of numbers.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        self._names = {
            at: x.node.expr
            for at, x in enumerate(inputs)
            if isinstance(x, torch.SymInt) and isinstance(x.node.expr, sympy.Symbol)
        }
        self._places = {name: at for at, name in self._names.items()}
        fake = torch._guards.detect_fake_mode(inputs)
        known: Any = None if fake is None else fake.shape_env
        self._ranges: Any = getattr(known, "var_to_range", None)
        self._guards: Any = getattr(known, "guards", None)
        self._read: dict[frozenset[int], tuple[list[Relation], Callable[..., list[float]]] | None]
        self._read = {}

    def hold(self, args: Sequence[Any], moving: Mapping[int, int], positions: range) -> bool:
        """Whether they hold for `args` at all positions, where the arguments `moving` are so far
        ahead of the position, and the others stay.

        False also where that cannot be told: they have to be linear in what moves, so that to hold
        at both ends is to hold between them.
        """
        if None in (self._ranges, self._guards) or not moving.keys() <= self._names.keys():
            return False
        if not positions or not self._within(moving, positions):
            return False
        which = frozenset(moving)
        if which not in self._read:
            self._read[which] = self._linear({self._names[at] for at in which})
        conditions = self._read[which]
        if conditions is None:
            return False
        ends = [
            [position + moving[at] if at in moving else args[at] for at in self._places.values()]
            for position in (positions[0], positions[-1])
        ]
        relations, apart = conditions
        return all(map(_holds, relations, *(apart(*values) for values in ends)))

    def _within(self, moving: Mapping[int, int], positions: range) -> bool:
        ranges = [(self._ranges.get(self._names[at]), ahead) for at, ahead in moving.items()]
        return all(
            allowed is not None
            and allowed.lower <= positions[0] + ahead
            and positions[-1] + ahead <= allowed.upper
            for allowed, ahead in ranges
        )

    def _linear(
        self, moving: set[sympy.Expr]
    ) -> tuple[list[Relation], Callable[..., list[float]]] | None:
        """The conditions on what moves, as relations and what is compared with 0; None where one
        of them is not linear, or of numbers that are no inputs."""
        names, found = list(self._places), dict[tuple[Relation, sympy.Expr], None]()
        for condition in _parts(guard.expr for guard in self._guards):
            if not condition.free_symbols & moving:
                continue
            relation = _RELATIONS.get(type(condition))
            if relation is None:
                return None
            apart = sympy.expand(condition.lhs - condition.rhs)
            straight = apart.is_polynomial(*moving) and not any(
                sympy.diff(apart, name).free_symbols & moving for name in moving
            )
            if not straight or not apart.free_symbols <= set(names):
                return None
            found[relation, apart] = None
        return [kind for kind, _ in found], sympy.lambdify(names, [apart for _, apart in found])


def _parts(conditions: Iterable[sympy.Basic]) -> Iterator[sympy.Basic]:
    for condition in conditions:
        if isinstance(condition, sympy.And):
            yield from _parts(condition.args)
        else:
            yield condition


def _holds(relation: Relation, first: float, last: float) -> bool:
    """Whether a linear function that is `first` and `last` at the ends relates to 0 all the way."""
    if relation is operator.ne:
        return first * last > 0
    return relation(first, 0) and relation(last, 0)
