"""The rotation probe: rotary pairs and frequencies, found from what the graph does to one vector at
several positions.

The same random vector is put at every token of a projection's output. Without a rotary embedding
the operand is then the same at every position; with one, each pair of dims at position p is the
pair at position 0 turned by p * frequency. Any spelling (half-split, interleaved, complex) and
partial rotary come out alike.
"""

from __future__ import annotations

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
    dim]` whose pairs turn by the row or the column of a grid alone, with some tokens before it."""
    start, length = value[:, 0], value.shape[1]
    pairs = _pairs(start, [value[:, p] for p in range(1, length)])
    angles = torch.stack([_angles(start, value[:, p], pairs) for p in range(length)])
    turning = (angles.abs() > _CLOSE).any(dim=1).nonzero()
    for prefix in range(int(turning[0]) + 1):
        if _on_grid(torch.polar(torch.ones_like(angles[prefix:]), angles[prefix:])):
            return torch.tensor(pairs), angles[int(turning[0])]
    raise Unknown("the rotation is linear in the position neither of a sequence nor of a grid")


def _on_grid(turns: Tensor) -> bool:
    """Whether each column of `[positions, pairs]` depends on the row or on the column of a grid
    alone, some on each."""
    count = len(turns)
    for width in (w for w in range(2, count // 2 + 1) if count % w == 0):
        laid = turns.unflatten(0, (-1, width))
        by_row = ((laid - laid[:, :1]).abs() < _CLOSE).all(1).all(0)
        by_column = ((laid - laid[:1]).abs() < _CLOSE).all(1).all(0)
        if bool((by_row | by_column).all()) and bool(by_row.any()) and bool(by_column.any()):
            return True
    return False


def _linear(value: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs `[n, 2]` and frequencies `[n]` by which position 0 turns into p, p times, for
    `[probes, seq, dim]`."""
    start, length = value[:, 0], value.shape[1]
    pairs = _pairs(start, [value[:, p] for p in range(1, length)])
    first = _angles(start, value[:, 1], pairs)
    ordered = [(a, b) if theta > 0 else (b, a) for (a, b), theta in zip(pairs, first, strict=True)]
    frequencies = first.abs()
    for p in range(2, length):
        seen, expected = _angles(start, value[:, p], ordered), p * frequencies
        if float((torch.polar(torch.ones_like(seen), seen - expected) - 1).abs().max()) > 1e-3:
            raise _NotLinear("the rotation is not linear in the position")
    return torch.tensor(ordered), frequencies


def _pairs(start: Tensor, others: list[Tensor]) -> list[tuple[int, int]]:
    """The pairs of dims of `[probes, dim]` that turn into each of the others; every other dim stays
    as it is. Raises `_NotLinear` when something else happens to a dim."""
    scale = float(start.abs().max())
    moved = [other for other in others if float((other - start).abs().max()) > 1e-9 * scale]
    if not moved:
        raise _NotLinear("the position does not change the operand of some heads")
    partner = sum(_left(start, other) for other in moved).argmin(dim=1)  # type: ignore[union-attr]
    still = torch.stack([(o - start).abs().amax(0) for o in moved]).amax(0) <= 1e-9 * scale
    found = []
    for a in range(start.shape[1]):
        b = int(partner[a])
        if still[a]:
            continue
        if still[b] or int(partner[b]) != a:
            raise _NotLinear("the position changes the operand, and not by turning pairs of dims")
        if a < b:
            found.append((a, b))
    for other in moved:
        _angles(start, other, found)
    return found


def _angles(start: Tensor, turned: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """By how much each pair turns, radians `[pairs]`. Raises `_NotLinear` when it does not only
    turn."""
    a, b = torch.tensor(pairs).T
    size = (start[:, a].square() + start[:, b].square()).sum(0)
    # The small angles are in the change, not in the value.
    cos = (
        1
        + (start[:, a] * (turned - start)[:, a] + start[:, b] * (turned - start)[:, b]).sum(0)
        / size
    )
    sin = (start[:, a] * (turned - start)[:, b] - start[:, b] * (turned - start)[:, a]).sum(
        0
    ) / size
    expected = torch.cat(
        (cos * start[:, a] - sin * start[:, b], sin * start[:, a] + cos * start[:, b]), dim=1
    )
    off = (expected - torch.cat((turned[:, a], turned[:, b]), dim=1)).abs().max()
    stretched = (cos.square() + sin.square() - 1).abs().max()
    if float(off) > 1e-3 * float(start.abs().max()) or float(stretched) > 1e-3:
        raise _NotLinear("the position changes the operand, and not by turning pairs of dims")
    return torch.atan2(sin, cos)


def _left(start: Tensor, turned: Tensor) -> Tensor:
    """What is left of the change of dim a after least squares on (a, b) of `start`, as a share of
    the change, `[dim, dim]`; infinite on the diagonal, 0 for a dim that stays."""
    change = turned - start
    own, gram = start.square().sum(0), start.T @ start
    at_own = (start * change).sum(0)
    at_other = change.T @ start  # [a, b]: sum over probes of change_a * start_b
    det = (own[:, None] * own[None, :] - gram**2).fill_diagonal_(1.0)
    cos = (at_own[:, None] * own[None, :] - at_other * gram) / det
    sin = (at_other * own[:, None] - at_own[:, None] * gram) / det
    size = change.square().sum(0)
    left = size[:, None] - cos * at_own[:, None] - sin * at_other
    share = left / size.clamp(min=1e-300)[:, None]
    share[size <= 1e-18 * float(start.square().sum())] = 0.0
    return share.fill_diagonal_(float("inf"))


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
