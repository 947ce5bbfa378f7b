"""The attention weights of some queries of one sequence: the definition (`attend.weights`) on a
slice of its rows.

Operands are taken as the model makes them and multiplied in float32 at least, so that a half
precision model's weights are not rounded before they are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.compiler import attend
from attnopt.compiler.spec import FULL, AttentionSpec

CAP_BYTES = 128 << 20  # of one slice of weights with the temporaries that figures take
_TEMPORARIES = 8


@dataclass(frozen=True)
class Slice:
    """Weights `[heads, R, T]` of the queries at positions `i` `[R]`, and which keys each of them
    may read, bool `[heads or 1, R, T]`."""

    i: Tensor
    weights: Tensor
    visible: Tensor


def slices(
    q: Tensor, k: Tensor, extras: Sequence[Tensor], spec: AttentionSpec, row: int, at: Tensor
) -> Iterator[Slice]:
    """The weights of sequence `row` at the query positions `at` (int64), in slices under the cap.

    q `[batch, heads, S, d]`, k `[batch or 1, kv_heads, T, d]`, extras as the spec names them.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    size = torch.finfo(wide).bits // 8
    room = max(1, CAP_BYTES // (_TEMPORARIES * size * q.shape[1] * k.shape[2]))
    keys = row_of(k, row)[None].to(wide)
    for i in at.split(room):
        queries = q[row : row + 1].index_select(2, i).to(wide)
        keep, given, names = _sliced(extras, spec, row, i, k.shape[2])
        told = spec.with_(mask=FULL, extras=("keep", *names))
        weights = attend.weights(queries, keys, [keep, *given], told)
        visible = keep
        if "bias" in names:  # a mask may be spelled as a bias of lowest numbers
            bias = given[names.index("bias")]
            visible = keep & (bias > torch.finfo(bias.dtype).min / 4)
        yield Slice(i, weights[0], visible.expand(1, -1, len(i), k.shape[2])[0])


def row_of(value: Tensor, row: int) -> Tensor:
    """A sequence's part of what may be the same for all of a batch, as learned keys are."""
    return value[min(row, len(value) - 1)]


def _sliced(
    extras: Sequence[Tensor], spec: AttentionSpec, row: int, i: Tensor, keys: int
) -> tuple[Tensor, list[Tensor], tuple[str, ...]]:
    """All that drops keys as one mask `[1, heads or 1, R, T]`, and the other extras' rows."""
    keep = spec.mask.keep(i[:, None], torch.arange(keys)[None])[None, None]
    given, names = list[Tensor](), list[str]()
    for name, value in zip(spec.extras, extras, strict=True):
        if name == "padding":
            keep = keep & row_of(value, row)[None, None, None]
            continue
        part = _rows(value, row, i)
        if name == "keep":
            keep = keep & part
        else:
            given.append(part)
            names.append(name)
    return keep, given, tuple(names)


def _rows(value: Tensor, row: int, i: Tensor) -> Tensor:
    """What broadcasts to `[batch, heads, S, .]`, at one sequence and some queries."""
    while value.dim() < 4:
        value = value.unsqueeze(0)
    if value.shape[0] > 1:
        value = value[row : row + 1]
    return value.index_select(2, i) if value.shape[2] > 1 else value
