"""What may be absorbed for free: the maps that commute with all that acts on a head.

A map M on the dims of a head can move from the key projection into the query projection only if
rotary, norms and casts on the way commute with it. That is tried, not assumed: random head vectors
go through the graph with M before and with M after.

With rotary the pair (a, b) is one complex number and only complex scalars commute, never a
reflection; a norm takes away the scale and leaves the turn, where its weight is equal on both dims
of a pair. Dims in no pair allow any matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from attnopt.compiler.program import Program
from attnopt.compiler.raising.evaluate import Evaluator, Unknown, concrete, example_sizes
from attnopt.compiler.raising.index_probe import small_sizes
from attnopt.compiler.site import Path, Site

PairFreedom = Literal["scale", "turn", "none"]


@dataclass(frozen=True)
class Freedom:
    """Which maps commute.

    `pairs`: complex scalars ("scale"), unit ones ("turn") or none on a rotary pair. `rest`: whether
    any matrix does on the dims in no pair. `why` says what forbids the rest.
    """

    pairs: PairFreedom
    rest: bool
    why: str = ""

    def __and__(self, other: Freedom) -> Freedom:
        order: tuple[PairFreedom, ...] = ("none", "turn", "scale")
        weaker = min(self.pairs, other.pairs, key=order.index)
        return Freedom(weaker, self.rest and other.rest, self.why or other.why)


def freedom(program: Program, site: Site, which: Literal["q", "k", "v"]) -> Freedom:
    """Probe one operand of a site. What cannot be evaluated has no freedom, and `why` says so."""
    path: Path | None = getattr(site, which)
    if path is not None and not path.split:
        return Freedom("none", False, site.unsplit(which))
    if path is None or not program.has(path.split):
        return Freedom("none", False, f"the heads of {which} are not a node of the graph")
    operand = program.node(site.node).args["qkv".index(which)]
    assert isinstance(operand, fx.Node)
    dim = path.channels.shape[1]
    pairs = (
        site.rotary.pairs if site.rotary is not None and which != "v" else torch.empty(0, 2).long()
    )
    try:
        through = _Way(program, program.node(path.split), operand)
        turn = through.commutes(turned(dim, pairs, torch.rand(len(pairs)) * 6.0))
        scale = turn and through.commutes(stretched(dim, pairs, torch.rand(len(pairs)) + 0.5))
        rest = through.commutes(mixed(dim, pairs))
    except Unknown as reason:
        return Freedom("none", False, str(reason))
    why = "" if scale and rest else "a norm stands between the projection and the attention"
    return Freedom("scale" if scale else "turn" if turn else "none", rest, why)


def permutes(program: Program, site: Site, which: Literal["q", "k", "v"], order: Tensor) -> bool:
    """Whether the heads of an operand may change places, int64 `order` `[heads]`, on their way
    from the projection to the attention."""
    path: Path | None = getattr(site, which)
    if path is None or not path.split or not program.has(path.split):
        return False
    operand = program.node(site.node).args["qkv".index(which)]
    assert isinstance(operand, fx.Node)
    try:
        way = _Way(program, program.node(path.split), operand)
        return way.permutes(2 if path.order == "bthd" else 1, order)
    except Unknown:
        return False


def turned(dim: int, pairs: Tensor, angles: Tensor) -> Tensor:
    """The rotation of each pair (a, b) by its angle (radians), `[dim, dim]` float64, as y = M x."""
    return complex_scalars(dim, pairs, torch.polar(torch.ones(len(pairs)), angles))


def stretched(dim: int, pairs: Tensor, factors: Tensor) -> Tensor:
    """Each pair times its factor, `[dim, dim]` float64."""
    return complex_scalars(dim, pairs, torch.complex(factors, torch.zeros(len(pairs))))


def mixed(dim: int, pairs: Tensor) -> Tensor:
    """A random matrix on the dims that are in no pair, the identity on the others.

    `[dim, dim]` float64.
    """
    made = torch.eye(dim, dtype=torch.float64)
    free = unpaired(dim, pairs)
    made[free[:, None], free[None, :]] = torch.randn(len(free), len(free), dtype=torch.float64)
    return made


def complex_scalars(dim: int, pairs: Tensor, factors: Tensor) -> Tensor:
    """Multiplication of each pair a + ib by its complex factor `[pairs]`.

    Answers a real `[dim, dim]` float64 matrix.
    """
    made = torch.eye(dim, dtype=torch.float64)
    a, b = pairs[:, 0], pairs[:, 1]
    real, imag = factors.real.double(), factors.imag.double()
    made[a, a], made[b, b] = real, real
    made[a, b], made[b, a] = -imag, imag
    return made


def unpaired(dim: int, pairs: Tensor) -> Tensor:
    """The dims of a head in no pair, int64 ascending."""
    taken = set(pairs.reshape(-1).tolist())
    return torch.tensor([d for d in range(dim) if d not in taken], dtype=torch.long)


class _Way:
    """The map from the split node to the operand, evaluated at small sizes on one random value."""

    def __init__(self, program: Program, split: fx.Node, operand: fx.Node) -> None:
        self.program, self.split, self.operand = program, split, operand
        self.sizes = small_sizes(program)
        known = {**example_sizes(program), **self.sizes}
        meta = split.meta["val"]
        self.dtype = meta.dtype
        # Norms and rotary tables are often worked out in float32, in a float64 model too.
        self.eps = max(torch.finfo(meta.dtype).eps, torch.finfo(torch.float32).eps)
        self.x = torch.randn([concrete(size, known) for size in meta.shape], dtype=torch.float64)
        self.y = self._run(self.x)

    def commutes(self, matrix: Tensor) -> bool:
        """Whether the matrix before gives the matrix after, to the rounding of the dtype."""
        before, after = self._run(self.x @ matrix.T), self.y @ matrix.T
        slack = 64 * self.eps * float(after.abs().max() + 1e-30)
        return bool((before - after).abs().max() <= slack)

    def permutes(self, axis: int, order: Tensor) -> bool:
        """Whether heads in another order before give the heads in that order after."""
        after = self.y.unflatten(1, (len(order), -1))[:, order].flatten(1, 2)
        x = self.x.unflatten(axis, (len(order), -1)).index_select(axis, order)
        before = self._run(x.flatten(axis, axis + 1))
        slack = 64 * self.eps * float(after.abs().max() + 1e-30)
        return bool((before - after).abs().max() <= slack)

    def _run(self, x: Tensor) -> Tensor:
        evaluator = Evaluator(self.program, self.sizes, {self.split: x.to(self.dtype)})
        value = evaluator(self.operand)
        if not isinstance(value, Tensor):
            raise Unknown(f"`{self.operand.name}` is not a tensor")
        return value.double()
