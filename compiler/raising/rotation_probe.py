"""The rotation probe: rotary pairs and frequencies, found from what the graph does to one vector at
several positions.

The same random vector is put at every token of a projection's output. Without a rotary embedding
the operand is then the same at every position; with one, each pair of dims at position p is the
pair at position 0 turned by p * frequency. Any spelling (half-split, interleaved, complex) and
partial rotary come out alike.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, fx

from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.raising.index_probe import Linearised
from attnopt.compiler.site import Rotary

PROBES = 6
_CLOSE = 1e-4


def rotary(held: Linearised, operand: fx.Node, seed: int = 0) -> Rotary | None:
    """The rotary embedding of an operand `[batch, heads, seq, dim]`; None when its value does not
    depend on the position.

    Raises Unknown when it does and turns pairs neither linearly in the position nor by the rows and
    columns of a grid.
    """
    generator = torch.Generator().manual_seed(seed)
    seen = [_one(held, operand, generator) for _ in range(-(-PROBES // max(1, held.shape()[0])))]
    value = torch.cat(seen)  # [probes, heads, seq, dim]
    if value.shape[2] < 3:
        raise Unknown("fewer than three positions can be probed")
    scale = float(value.abs().max())
    if float((value - value[:, :, :1]).abs().max()) < _CLOSE * scale:
        return None
    heads = range(value.shape[1])
    axes = 1
    try:
        turns = [_linear(value[:, h]) for h in (heads[0], heads[-1])]
    except _NotLinear:
        axes = 2
        turns = [_gridded(value[:, h]) for h in (heads[0], heads[-1])]
    if not torch.equal(turns[0][0], turns[1][0]) or not torch.allclose(
        turns[0][1], turns[1][1], atol=1e-3
    ):
        raise Unknown(f"the heads of `{operand.name}` are rotated differently")
    pairs, frequencies = turns[0]
    return Rotary(pairs, frequencies, 1.0, _spelling(pairs), axes)


class _NotLinear(Unknown):
    """Pairs of dims may turn, but not by the position times a frequency."""


def _one(held: Linearised, operand: fx.Node, generator: torch.Generator) -> Tensor:
    shape = held.shape()
    batch = operand.meta["val"].shape[0]
    vectors = torch.randn(
        (shape[0], *([1] * (len(shape) - 2)), shape[-1]), generator=generator, dtype=torch.float64
    )
    if len(shape) == 2 or shape[0] != _size(held, batch):
        vectors = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    value: Tensor = held.at(vectors.expand(shape).contiguous())(operand).double()
    return value if len(shape) > 2 and shape[0] == value.shape[0] else value[:1]


def _size(held: Linearised, size: int | torch.SymInt) -> int:
    from attnopt.compiler.raising.evaluate import concrete

    return concrete(size, held.sizes)


def _gridded(value: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs `[n, 2]` and the angles `[n]` at the first position that turns, for `[probes, seq,
    dim]` whose pairs turn by the row or the column of each position alone."""
    start = value[:, 0]
    moved = [p for p in range(1, value.shape[1]) if not torch.equal(value[:, p], start)]
    _, _, partner = _fit(start, value[:, moved[0]])
    pairs = [(a, int(b)) for a, b in enumerate(partner) if a < b and int(partner[b]) == a]
    angles = torch.zeros(value.shape[1], len(pairs), dtype=torch.float64)
    own = start.square().sum(0)
    for n, (a, b) in enumerate(pairs):
        for p in moved:
            turned = value[:, p]
            size = own[a] + own[b]
            cos = (start[:, a] @ turned[:, a] + start[:, b] @ turned[:, b]) / size
            sin = (start[:, a] @ turned[:, b] - start[:, b] @ turned[:, a]) / size
            back = torch.stack((cos * turned[:, a] + sin * turned[:, b],
                                cos * turned[:, b] - sin * turned[:, a]))  # fmt: skip
            off = (back - start[:, [a, b]].T).abs().max()
            if float(off) > 1e-3 * float(start.abs().max()):
                raise Unknown("the position changes the operand, and not by turning pairs of dims")
            angles[p, n] = torch.atan2(sin, cos)
    kinds = [len(torch.unique((angles[moved, n] * 1e4).round())) for n in range(len(pairs))]
    if not pairs or any(2 * kind > len(moved) for kind in kinds):
        raise Unknown("the rotation is linear in the position neither of a sequence nor of a grid")
    return torch.tensor(pairs), angles[moved[0]]


def _linear(value: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs `[n, 2]` and frequencies `[n]` that turn position 0 into 1 and, twice, into 2, for
    `[probes, seq, dim]`."""
    start, one, two = (value[:, p] for p in (0, 1, 2))
    cos1, sin1, partner = _fit(start, one)
    still = (one - start).abs().amax(0) < 1e-9 * float(start.abs().max())
    angle1 = torch.atan2(-sin1, cos1)
    pairs, frequencies = [], []
    for a in range(start.shape[1]):
        b = int(partner[a])
        if still[a] or a > b:
            continue
        if int(partner[b]) != a:
            raise _NotLinear("the position changes the operand, and not by turning pairs of dims")
        theta = float(angle1[a])
        pair, theta = ((a, b), theta) if theta > 0 else ((b, a), -theta)
        expected = start[:, pair[0]] * math.cos(2 * theta) - start[:, pair[1]] * math.sin(2 * theta)
        if float((expected - two[:, pair[0]]).abs().max()) > 1e-3 * float(start.abs().max()):
            raise _NotLinear("the rotation is not linear in the position")
        pairs.append(pair)
        frequencies.append(theta)
    if not pairs:
        raise _NotLinear("the position changes the operand, and not by turning pairs of dims")
    return torch.tensor(pairs), torch.tensor(frequencies, dtype=torch.float64)


def _fit(start: Tensor, turned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares of each dim a of `turned` on (a, b) of `start`, over all b: cos, sin factor and
    the best b, each [dim]. What is fitted is the change, which may be tiny beside the value."""
    change = turned - start
    gram = start.T @ start
    own, cross = gram.diagonal(), gram
    at_own = (start * change).sum(0)
    at_other = change.T @ start  # [a, b]: sum over probes of change_a * start_b
    det = own[:, None] * own[None, :] - cross**2
    det = det.fill_diagonal_(1.0)
    cos = (at_own[:, None] * own[None, :] - at_other * cross) / det
    sin = (at_other * own[:, None] - at_own[:, None] * cross) / det
    left = (change**2).sum(0)[:, None] - cos * at_own[:, None] - sin * at_other
    left = left.fill_diagonal_(float("inf"))
    partner = left.argmin(dim=1)
    rows = torch.arange(len(partner))
    return 1.0 + cos[rows, partner], sin[rows, partner], partner


def _spelling(pairs: Tensor) -> Literal["half", "interleaved", "other"]:
    ordered = pairs.sort(dim=1).values
    ordered = ordered[ordered[:, 0].argsort()]
    gaps = (ordered[:, 1] - ordered[:, 0]).unique()
    if len(gaps) != 1:
        return "other"
    if (
        int(gaps) == 1
        and len(pairs) > 1
        and torch.equal(ordered[:, 0] % 2, ordered[:1, 0].expand(len(pairs)) % 2)
    ):
        return "interleaved"
    return "half" if int(gaps) == len(pairs) else "other"
