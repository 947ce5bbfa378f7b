"""Views as maps of index expressions: which element of its input an element of a view is.

Covers broadcasting, slices, selects, transposes and the merging and splitting of axes; raises
`Unknown` for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.raising.expression import Affine

Index = tuple[Affine, ...]
ZERO = Affine()
VIEWS = {
    "expand", "expand_as", "unsqueeze", "squeeze", "slice", "select", "transpose", "permute", "t",
    "view", "reshape", "unsafe_view", "flatten", "unflatten", "view_as", "narrow",
}  # fmt: skip
_RESHAPES = {"view", "reshape", "unsafe_view", "flatten", "unflatten", "view_as", "squeeze"}


def size_form(size: Any) -> Affine:
    """A size, symbolic or not, as an affine form in the size symbols.

    A product or quotient of symbols (patches of an image) is one more unknown size. Raises Unknown
    where it may be negative.
    """
    if not isinstance(size, torch.SymInt):
        return Affine((), int(size))
    total = Affine()
    for symbol, coefficient in size.node.expr.as_coefficients_dict().items():
        if not coefficient.is_Integer or not (symbol == 1 or _never_negative(symbol)):
            raise Unknown(f"size `{size.node.expr}` is not a sum of sizes")
        term = Affine((), 1) if symbol == 1 else Affine(((str(symbol), 1),))
        total = total.plus(term, int(coefficient))
    return total


def _never_negative(expression: Any) -> bool:
    """Whether an expression is built from sizes by products and whole quotients alone."""
    if expression.is_Symbol or (expression.is_Integer and expression >= 0):
        return True
    built = expression.is_Mul or type(expression).__name__ == "FloorDiv"
    if expression.is_Pow:
        return bool(expression.exp.is_Integer and expression.exp > 0) and _never_negative(
            expression.base
        )
    return built and all(_never_negative(part) for part in expression.args)


def broadcast(shape: Sequence[Any], index: Index) -> Index:
    """The index into an operand of this shape that broadcasts to a result with the given index."""
    if len(shape) > len(index):
        raise Unknown("an operand has more axes than its result")
    kept = index[len(index) - len(shape) :]
    return tuple(ZERO if _is_one(size) else at for size, at in zip(shape, kept, strict=True))


def moved(node: fx.Node, name: str, index: Index, extents: Mapping[str, Any]) -> Index | None:
    """The index into the first operand of a view that gives its element at `index`; None when it is
    no view.
    """
    if name not in VIEWS:
        return None
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    if name in ("expand", "expand_as"):
        return broadcast(shape, index)
    if name in _RESHAPES:
        return reshaped(shape, node.meta["val"].shape, index, extents)
    arguments: list[Any] = list(node.args[1:])
    if name == "t":
        return index[::-1]
    if name == "unsqueeze":
        at = _axis(arguments[0], len(index))
        return (*index[:at], *index[at + 1 :])
    if name == "permute":
        order = [_axis(dim, len(index)) for dim in arguments[0]]
        return tuple(index[order.index(dim)] for dim in range(len(index)))
    if name == "transpose":
        a, b = (_axis(dim, len(index)) for dim in arguments)
        swapped = list(index)
        swapped[a], swapped[b] = index[b], index[a]
        return tuple(swapped)
    if name == "select":
        at = _axis(arguments[0], len(shape))
        return (*index[:at], _start(arguments[1], shape[at]), *index[at:])
    return _sliced(name, arguments, shape, index)


def reshaped(
    inner: Sequence[Any], outer: Sequence[Any], index: Index, extents: Mapping[str, Any]
) -> Index:
    """The index into a tensor of shape `inner` that a contiguous view of it with shape `outer` has
    at `index`.
    """
    found: list[Affine] = []
    left, right = [_expr(s) for s in inner], [_expr(s) for s in outer]
    places = list(index)
    while left or right:
        mine, theirs = _group(left, right)
        flat = _flat(right[:theirs], places[:theirs])
        found += _unflat(left[:mine], flat, extents)
        left, right, places = left[mine:], right[theirs:], places[theirs:]
    return tuple(found)


def _group(left: list[Any], right: list[Any]) -> tuple[int, int]:
    """The shortest non-empty prefixes of two shapes that hold the same number of elements."""
    for total in range(1, len(left) + len(right) + 1):
        for mine in range(max(0, total - len(right)), min(total, len(left)) + 1):
            theirs = total - mine
            if sympy.expand(sympy.prod(left[:mine]) - sympy.prod(right[:theirs])) == 0:
                return mine, theirs
    raise Unknown("this change of shape is not understood")


def _flat(sizes: list[Any], index: list[Affine]) -> Affine:
    total = Affine()
    for at, size in zip(index, sizes, strict=True):
        if total == ZERO:
            total = at
        elif not size.is_Integer:
            raise Unknown("it merges an axis whose length varies")
        else:
            total = total.scaled(int(size)).plus(at)
    return total


def _unflat(sizes: list[Any], flat: Affine, extents: Mapping[str, Any]) -> list[Affine]:
    found: list[Affine] = []
    for place, size in enumerate(reversed(sizes)):
        if size == 1:
            found.append(ZERO)
        elif all(other == 1 for other in sizes[: len(sizes) - place - 1]):
            found.append(flat)
            flat = ZERO
        elif not size.is_Integer:
            raise Unknown("it splits an axis by a length that varies")
        else:
            flat, rest = _divided(flat, int(size), extents)
            found.append(rest)
    return found[::-1]


def _divided(form: Affine, by: int, extents: Mapping[str, Any]) -> tuple[Affine, Affine]:
    """Quotient and remainder of an affine form by a positive number, when they are affine for every
    index.
    """
    whole = Affine(tuple((v, c // by) for v, c in form.terms if c % by == 0), form.constant // by)
    rest = Affine(tuple((v, c) for v, c in form.terms if c % by), form.constant % by)
    most = rest.constant
    for name, coefficient in rest.terms:
        extent = extents.get(str(name)) if isinstance(name, str) else None
        if not isinstance(extent, int) or coefficient < 0:
            raise Unknown("it splits a position that is not a merged axis")
        most += coefficient * (extent - 1)
    if most >= by:
        raise Unknown("it splits an axis in another place than it was merged")
    return whole, rest


def _sliced(name: str, arguments: list[Any], shape: Sequence[Any], index: Index) -> Index:
    padded = [*arguments, *[None] * (4 - len(arguments))]
    dim, start, step = padded[0], padded[1], padded[3]
    at = _axis(dim or 0, len(index))
    if name == "narrow":
        step = 1
    stride = 1 if step is None else step
    if not isinstance(stride, int):
        raise Unknown("its step is not a number")
    first = _start(0 if start is None else start, shape[at])
    return (*index[:at], index[at].scaled(stride).plus(first), *index[at + 1 :])


def _start(value: Any, size: Any) -> Affine:
    """A start position as a form that is never negative: Python's negative positions count from the
    end.
    """
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, int) and value < 0:
        return size_form(size).plus(Affine((), value))
    form = size_form(value)
    if form.constant < 0 or any(coefficient < 0 for _, coefficient in form.terms):
        raise Unknown("its start may be negative")
    return form


def _axis(dim: Any, rank: int) -> int:
    if not isinstance(dim, int):
        raise Unknown("its axis is not a number")
    return dim % rank


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))
