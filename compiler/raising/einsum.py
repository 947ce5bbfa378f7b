"""Attention written with einsum: which axis of each operand is which.

Scores are `..s.. d, ..t.. d -> batch.. s t`, the product with values `batch.. s t, ..t.. e -> any
order of batch.., s, e`. An operand may lack a batch axis, as keys that all heads share do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.compiler.raising.crossing import Stop

aten = torch.ops.aten
EINSUM = aten.einsum.default


@dataclass(frozen=True)
class Axes:
    """An operand's axes by letter as they are, and as they are wanted; what it lacks is 1 wide."""

    source: str
    target: str

    def moved(self, node: fx.Node, call: Callable[..., fx.Node]) -> fx.Node:
        """The operand with its axes as wanted."""
        present = [letter for letter in self.target if letter in self.source]
        order = [self.source.index(letter) for letter in present]
        made = node if order == sorted(order) else call(aten.permute.default, node, order)
        for at, letter in enumerate(self.target):
            if letter not in self.source:
                made = call(aten.unsqueeze.default, made, at)
        return made


def operands(node: fx.Node) -> tuple[Any, ...]:
    """The tensors of a product: of an einsum's list, or the first two arguments."""
    args: Any = node.args
    return tuple(args[1]) if node.target is EINSUM else tuple(args[:2])


def scores(node: fx.Node) -> tuple[Axes, Axes] | Stop:
    """How queries and keys `[batch.., S or T, d]` lie in an einsum that makes scores."""
    (left, right), out = _letters(node)
    batch, s, t = out[:-2], out[-2:-1], out[-1:]
    depth = (set(left) & set(right)) - set(out)
    given = {*left, *right} <= {*out, *depth}
    if len(depth) != 1 or s not in left or t not in right or not given:
        return _strange(node, "q and k")
    if t in left or s in right or not set(batch) <= set(left):
        return _strange(node, "q and k")
    d = depth.pop()
    return Axes(left, f"{batch}{s}{d}"), Axes(right, f"{batch}{t}{d}")


def values(node: fx.Node, weights: fx.Node) -> tuple[fx.Node, Axes, Axes] | Stop:
    """The values of an einsum with the attention weights, how they lie `[batch.., T, v_dim]`, and
    how the result lies that is `[batch.., S, v_dim]` first."""
    pair, letters = operands(node), _letters(node)
    own = pair.index(weights)
    mine, theirs, out = letters[0][own], letters[0][1 - own], letters[1]
    batch, s, t = mine[:-2], mine[-2:-1], mine[-1:]
    depth = set(theirs) - set(mine)
    if len(depth) != 1 or t not in theirs or s in theirs or t in out:
        return _strange(node, "weights and values")
    e = depth.pop()
    if sorted(out) != sorted(f"{batch}{s}{e}"):
        return _strange(node, "weights and values")
    return pair[1 - own], Axes(theirs, f"{batch}{t}{e}"), Axes(f"{batch}{s}{e}", out)


def mixes(node: fx.Node) -> fx.Node | None:
    """The scores that an einsum with a parameter takes and gives back with their last two axes in
    place, as one that mixes heads does; or None."""
    pair = operands(node)
    held = [x for x in pair if isinstance(x, fx.Node) and x.op != "get_attr"]
    if node.target is not EINSUM or len(pair) != 2 or len(held) != 1:
        return None
    letters, out = _letters(node)
    kept = letters[pair.index(held[0])][-2:] == out[-2:]
    return held[0] if kept else None


def _letters(node: fx.Node) -> tuple[tuple[str, str], str]:
    """The letters of two operands and of the result; an ellipsis gets capital ones."""
    equation = str(node.args[0]).replace(" ", "")
    inputs, _, out = equation.partition("->")
    left, _, right = inputs.partition(",")
    ranks = [x.meta["val"].dim() for x in (*operands(node), node)]
    hidden = [rank - len(part.replace("...", "")) for rank, part in zip(ranks, (left, right, out),
              strict=False)]  # fmt: skip
    spare = [letter for letter in "ZYXWVUTS" if letter not in equation]
    left, right, out = (
        part.replace("...", "".join(reversed(spare[:count])))
        for part, count in zip((left, right, out), hidden, strict=False)
    )
    return (left, right), out


def _strange(node: fx.Node, of: str) -> Stop:
    return Stop(f"einsum `{node.args[0]}` is not a product of {of} per head", node)
