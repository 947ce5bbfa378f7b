"""The sizes of views once one axis of what they are made of has another size.

Heads that become fewer (or smaller) change one axis of a node. In the views after it that axis may
be joined to the batch, to the dims of a head or to other heads, and its size may be a number, -1 or
a node that computes it. Which axis of a view holds it is seen by running the graph at small sizes
on two values that differ in the first position of that axis alone: the axis along which some
positions differ and some do not is the one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, cast

import sympy  # a dependency of torch
import torch
from torch import Tensor, fx

from attnopt.compiler.layout import expression, same_size
from attnopt.compiler.program import Program
from attnopt.compiler.raising.evaluate import Evaluator, Unknown, concrete, example_sizes
from attnopt.compiler.raising.index_probe import small_sizes

aten = torch.ops.aten
Values = Mapping[fx.Node, fx.Node]


class Changed:
    """Where the axis that `roots` (old node -> new node) differ in has gone, node by node; `axis`
    names it where their sizes may be equal."""

    def __init__(self, program: Program, roots: Values, axis: int | None = None) -> None:
        self.program, self.roots, self.at = program, dict(roots), axis
        self._pair: tuple[Evaluator, Evaluator] | None = None

    def axis(self, node: fx.Node) -> int | None:
        """The axis of an old node that holds the changed one; None where no one axis does, or the
        node cannot be run."""
        try:
            first, second = (run(node) for run in self._evaluators())
        except Unknown:
            return None
        if not isinstance(first, Tensor) or first.shape != second.shape:
            return None
        unlike = first != second
        told = [
            axis
            for axis in range(unlike.dim())
            if 0 < int(unlike.movedim(axis, 0).flatten(1).any(1).sum()) < unlike.shape[axis]
        ]
        return told[0] if len(told) == 1 else None

    def viewed(self, node: fx.Node, values: Values) -> Iterator[list[Any]]:
        """Size lists for a view or an unflatten of the new input; the likeliest come first where
        the axis is not found by running."""
        source = cast(fx.Node, node.args[0])
        split = node.target is aten.unflatten.int
        sizes = list(cast(Any, node.args[2 if split else 1]))
        first = int(cast(int, node.args[1])) % source.meta["val"].dim() if split else 0
        ratio = _ratio(values[source], source)
        if ratio == 1 or ratio is None:
            yield sizes
            return
        axis = self.axis(node)
        spots = range(len(sizes)) if axis is None else [axis - first]
        if axis is not None and not 0 <= axis - first < len(sizes):
            yield sizes  # it is not among the axes that are named
            return
        at = _first_change(values[source], source)
        lead = _product(source.meta["val"].shape[:at])
        size = expression(source.meta["val"].shape[at])
        shape = node.meta["val"].shape
        for spot in sorted(spots, key=lambda spot: _unlikely(shape, first + spot, lead, size)):
            new = self._times(sizes[spot], ratio, node)
            if new is not None:
                yield [*sizes[:spot], new, *sizes[spot + 1 :]]

    def expanded(self, node: fx.Node, values: Values) -> list[Any]:
        """The sizes of an expand. Own sizes follow the new input, and a repetition of heads is
        dropped."""
        source = cast(fx.Node, node.args[0])
        before = list(source.meta["val"].shape)
        after = list(values.get(source, source).meta["val"].shape)
        sizes = list(cast(Any, node.args[1]))
        lead = len(sizes) - len(before)
        for axis in range(lead, len(sizes)):
            size, own, now = sizes[axis], before[axis - lead], after[axis - lead]
            if not isinstance(size, int) or size == -1:
                continue
            repeats = own == 1 and size > 1 and axis < len(sizes) - 1
            if repeats and axis == len(sizes) - 2:  # heads are told apart from a sequence of one
                repeats = self.axis(source) == axis - lead - 1
            if repeats or isinstance(now, int):
                sizes[axis] = now
        return sizes

    def _evaluators(self) -> tuple[Evaluator, Evaluator]:
        """The graph on two values that differ in the first position of the changed axis."""
        if self._pair is None:
            sizes = small_sizes(self.program)
            known = {**example_sizes(self.program), **sizes}
            drawn = torch.Generator().manual_seed(0)
            given: tuple[dict[fx.Node, Tensor], dict[fx.Node, Tensor]] = ({}, {})
            for old, new in self.roots.items():
                meta = old.meta["val"]
                shape = [concrete(size, known) for size in meta.shape]
                x = torch.randn(shape, generator=drawn).to(meta.dtype)
                other = x.clone()
                axis = _first_change(new, old) if self.at is None else self.at
                other.select(axis, 0).neg_()
                given[0][old], given[1][old] = x, other
            first, second = (Evaluator(self.program, sizes, x) for x in given)
            self._pair = first, second
        return self._pair

    def _times(self, size: Any, ratio: sympy.Rational, before: fx.Node) -> Any:
        """A size `ratio` times as large, as a number or a node; None where it is no whole number.
        -1 stays, as it is worked out."""
        if isinstance(size, int):
            if size == -1:
                return size
            return int(size * ratio) if (size * ratio).is_integer else None
        wanted = sympy.cancel(expression(size.meta["val"]) * ratio)
        if sympy.fraction(wanted)[1] != 1:
            return None
        if size.target is operator.mul:
            for at, factor in enumerate(size.args):
                if isinstance(factor, int) and (factor * ratio).is_integer:
                    return self._size(operator.mul, size.args[1 - at], int(factor * ratio), before)
        more = self._size(operator.mul, size, int(ratio.p), before)
        return self._size(operator.floordiv, more, int(ratio.q), before)

    def _size(self, target: Any, size: fx.Node, number: int, before: fx.Node) -> fx.Node:
        if number == 1:
            return size
        with self.program.graph.inserting_before(before):
            made = self.program.graph.call_function(target, (size, number))
        made.meta["val"] = target(size.meta["val"], number)
        return made


def one_axis(old: fx.Node, new: fx.Node) -> bool:
    """Whether two nodes have the same sizes but for one axis at most."""
    a, b = old.meta["val"].shape, new.meta["val"].shape
    return len(a) == len(b) and sum(not same_size(x, y) for x, y in zip(a, b, strict=True)) <= 1


def _unlikely(shape: Any, axis: int, lead: Any, size: Any) -> int:
    """0 where an axis begins where the changed axis, of `size` after `lead` elements, did; 1 where
    it holds all of that axis; 2 elsewhere."""
    inside = sympy.cancel(lead / _product(shape[:axis]))
    if inside == 1:
        return 0
    whole = sympy.cancel(expression(shape[axis]) / (inside * size))
    return 1 if inside.is_Integer and whole.is_Integer else 2


def _product(sizes: Any) -> sympy.Expr:
    found: sympy.Expr = sympy.Integer(1)
    for size in sizes:
        found = found * expression(size)
    return found


def _ratio(new: fx.Node, old: fx.Node) -> Any:
    """Elements of `new` over elements of `old` as a rational number.

    None when it depends on a symbol.
    """
    found = sympy.cancel(_product(new.meta["val"].shape) / _product(old.meta["val"].shape))
    return found if found.is_Rational else None


def _first_change(new: fx.Node, old: fx.Node) -> int:
    pairs = enumerate(zip(new.meta["val"].shape, old.meta["val"].shape, strict=True))
    return next((at for at, (a, b) in pairs if not same_size(a, b)), 0)
