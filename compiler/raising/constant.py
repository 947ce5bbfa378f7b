"""Constant tensors recognised by their values: one number, a run of positions, a band such as a
triangle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.raising.evaluate import LIMIT, Unknown
from attnopt.compiler.raising.expression import Affine, Expression, both, compare, number, where
from attnopt.compiler.raising.symbolic_views import Index


def element(value: Any, index: Index) -> Expression:
    """The element of a constant tensor at `index`. Raises Unknown when its values follow no simple
    rule.

    The rule holds at every position inside the tensor, and positions outside of it cannot be read.
    """
    if not isinstance(value, Tensor) or value.device.type == "meta":
        raise Unknown("a constant without values")
    if value.numel() == 0 or value.numel() > LIMIT:
        raise Unknown(f"a constant of {value.numel()} elements")
    if value.is_floating_point() and bool(value.isnan().any()):
        raise Unknown("a constant that holds NaN")
    first = value.flatten()[0]
    if bool((value == first).all()):
        return number(first.item())
    axes = [dim for dim, size in enumerate(value.shape) if size > 1]
    places = [index[dim] for dim in axes]
    core = value.detach().reshape([value.shape[dim] for dim in axes])
    if core.dim() == 1 and not core.dtype.is_floating_point and core.dtype != torch.bool:
        return _run(core, places[0])
    if core.dim() == 2:
        return _band(core, places[0], places[1])
    raise Unknown("a constant whose values follow no simple rule")


def _run(values: Tensor, at: Affine) -> Affine:
    """start + step * position."""
    start, step = int(values[0]), int(values[1] - values[0])
    expected = start + step * torch.arange(len(values), device=values.device)
    if not torch.equal(values.long(), expected):
        raise Unknown("a constant that does not count evenly")
    return at.scaled(step).plus(Affine((), start))


def _band(values: Tensor, row: Affine, column: Affine) -> Expression:
    """One value where low <= row - column <= high, another elsewhere."""
    rows, columns = values.shape
    inside = values == values[0, 0]
    other = values[~inside][0]
    if not bool((values[~inside] == other).all()):
        raise Unknown("a constant of more than two values")
    offsets = torch.cat([inside[0].flip(0), inside[1:, 0]])  # by row - column, from 1 - columns on
    held = offsets.nonzero().flatten()
    low, high = int(held[0]) - (columns - 1), int(held[-1]) - (columns - 1)
    i = torch.arange(rows, device=values.device)[:, None]
    distance = i - torch.arange(columns, device=values.device)[None, :]
    if not torch.equal(inside, (distance >= low) & (distance <= high)):
        raise Unknown("a constant that is no band along the diagonal")
    offset = row.plus(column, -1)
    conditions = []
    if low > 1 - columns:
        conditions.append(compare("ge", offset, number(low)))
    if high < rows - 1:
        conditions.append(compare("le", offset, number(high)))
    return where(both(*conditions), number(values[0, 0].item()), number(other.item()))
