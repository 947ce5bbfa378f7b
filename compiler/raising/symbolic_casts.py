"""Casts of index expressions between dtypes."""

from __future__ import annotations

import torch

from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.raising.expression import (
    Affine,
    Const,
    Expression,
    leaves,
    map_leaves,
    number,
    numeric,
    truth,
)

_HALF = (torch.float16, torch.bfloat16)
_NARROW = (torch.int8, torch.uint8, torch.int16)


def cast_to(x: Expression, dtype: torch.dtype) -> Expression:
    """The expression cast to a dtype. Raises Unknown where positions would be rounded."""
    if dtype == torch.bool:
        return truth(x)
    return map_leaves(lambda leaf: _cast_leaf(leaf, dtype), numeric(x))


def _cast_leaf(x: Expression, dtype: torch.dtype) -> Expression:
    if isinstance(x, Affine) and (x.terms or not dtype.is_floating_point):
        if dtype in _HALF:
            raise Unknown("positions are rounded to half precision")
        return x
    value = x.constant if isinstance(x, Affine) else x.value  # type: ignore[union-attr]
    cast = torch.tensor(value, dtype=torch.float64).to(dtype).item()
    return Const(float(cast)) if dtype.is_floating_point else number(int(cast))


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether a cast from `narrow` to `wide` keeps values in order and apart, near 0 at least."""
    if torch.bool in (wide, narrow):
        return True
    if wide.is_floating_point:
        return not narrow.is_floating_point or wide.itemsize >= narrow.itemsize
    if narrow.is_floating_point:
        return False
    a, b = torch.iinfo(wide), torch.iinfo(narrow)
    return a.min <= b.min and b.max <= a.max


def runs_over(x: Expression, dtype: torch.dtype) -> bool:
    """Whether an expression counts positions or sizes in a dtype that is too narrow for them."""
    return dtype in _NARROW and any(
        isinstance(leaf, Affine) and any(isinstance(name, str) for name, _ in leaf.terms)
        for leaf in leaves(x)
    )
