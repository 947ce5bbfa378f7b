"""Where the batch and sequence axes of a value lie, through views, transposes and merges: `Layout`.

A padded value `[batch, seq, ...]`, in any order of axes, is written as one tuple of atoms per axis:
"B", "S" or the size of a free axis. `[B, H, S, d]` is ((B), (H), (S), (d)); heads folded into the
batch, `[B*H, S, d]`, is ((B, H), (S), (d)). Its packed form is `[N, free...]`: one axis of kept
tokens, then the free atoms in the same order. So a transpose that only moves B or S is the identity
there, and a view that keeps B and S whole is a view of the free axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch

Atom = Literal["B", "S"] | int
Dim = tuple[Atom, ...]
TOKEN_AXES = ("B", "S")


@dataclass(frozen=True)
class Layout:
    """The axes of a padded value, each a non-empty tuple of atoms; neighbouring free atoms of one
    axis are joined."""

    dims: tuple[Dim, ...]

    @property
    def free(self) -> tuple[int, ...]:
        """The sizes of the packed axes after the first."""
        return tuple(atom for dim in self.dims for atom in dim if isinstance(atom, int))

    def axis(self, dim: int) -> int | None:
        """The packed axis that holds axis `dim`, or None where that axis holds B or S."""
        dim = self.index(dim)
        if not is_free(self.dims[dim]):
            return None
        return 1 + sum(isinstance(atom, int) for before in self.dims[:dim] for atom in before)

    def index(self, dim: int) -> int:
        """The axis as a non-negative number."""
        return dim + len(self.dims) if dim < 0 else dim

    def put(self, dim: int, size: int) -> Layout:
        """The layout with the free axis `dim` at another size."""
        at = self.index(dim)
        return Layout((*self.dims[:at], (size,), *self.dims[at + 1 :]))

    def drop(self, dim: int) -> Layout:
        """The layout without axis `dim`."""
        at = self.index(dim)
        return Layout((*self.dims[:at], *self.dims[at + 1 :]))

    def insert(self, at: int, size: int) -> Layout:
        """The layout with a free axis put before axis `at`."""
        return Layout((*self.dims[:at], (size,), *self.dims[at:]))

    def permute(self, order: Sequence[int]) -> tuple[Layout, tuple[int, ...]]:
        """The axes in another order, and the order of packed axes that goes with it."""
        made = Layout(tuple(self.dims[i] for i in order))
        starts = [
            1 + sum(isinstance(a, int) for d in self.dims[:i] for a in d)
            for i in range(len(self.dims))
        ]
        packed = [0]
        for i in order:
            packed += [starts[i] + k for k in range(sum(isinstance(a, int) for a in self.dims[i]))]
        return made, tuple(packed)


def is_free(dim: Dim) -> bool:
    """Whether an axis holds neither B nor S."""
    return len(dim) == 1 and isinstance(dim[0], int)


@dataclass(frozen=True)
class Extent:
    """The batch size and the padded length of a program, as sizes of its graph (symbolic or
    not)."""

    batch: Any
    seq: Any

    def of(self, dim: Dim) -> sympy.Expr:
        """The size of an axis."""
        known = {"B": expression(self.batch), "S": expression(self.seq)}
        return sympy.Mul(*(known[a] if isinstance(a, str) else sympy.Integer(a) for a in dim))

    def fits(self, layout: Layout, shape: Sequence[Any]) -> bool:
        """Whether a layout says the sizes that a value has."""
        return len(shape) == len(layout.dims) and all(
            sympy.expand(self.of(dim) - expression(size)) == 0
            for dim, size in zip(layout.dims, shape, strict=True)
        )

    def view(self, layout: Layout, shape: Sequence[Any]) -> Layout | None:
        """The layout after a row-major view to `shape`; None when the view cuts B or S, or mixes
        them up."""
        left: list[Atom] = [atom for dim in layout.dims for atom in dim]
        dims: list[Dim] = []
        for size in shape:
            taken = self._take(left, expression(size))
            if taken is None:
                return None
            dims.append(taken)
        return Layout(tuple(dims)) if all(atom == 1 for atom in left) else None

    def _take(self, left: list[Atom], rest: sympy.Expr) -> Dim | None:
        """Take the atoms of one axis of size `rest` off the front of `left`."""
        taken: list[Atom] = []
        while rest != 1:
            if not left:
                return None
            atom = left.pop(0)
            if atom == 1:
                continue
            if isinstance(atom, int) and rest.is_Integer and atom % int(rest) == 0:
                left.insert(0, atom // int(rest))
                atom = int(rest)
            smaller = _divide(rest, self.of((atom,)))
            if smaller is None:
                return None
            if isinstance(atom, int) and taken and isinstance(taken[-1], int):
                taken[-1] *= atom
            else:
                taken.append(atom)
            rest = smaller
        return tuple(taken) or (1,)


def expression(size: Any) -> sympy.Expr:
    """A size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def is_symbol(size: Any) -> bool:
    """Whether a size may vary: a SymInt that the trace has narrowed to one number may not."""
    return not expression(size).is_Integer


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression."""
    return bool(sympy.expand(expression(a) - expression(b)) == 0)


def _divide(size: sympy.Expr, by: sympy.Expr) -> sympy.Expr | None:
    ratio = sympy.cancel(size / by)
    return ratio if sympy.fraction(ratio)[1] == 1 else None
