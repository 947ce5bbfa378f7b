"""A temperature per head, so that changed keys give attention as sharp as the original's.

Of a few temperatures t the one is taken for which the weights softmax(t q.k) are nearest to the
original's (Kullback-Leibler divergence, mean over queries); it moves into the query projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from attnopt.compiler import attend
from attnopt.compiler.program import Batch, Program, peek
from attnopt.compiler.spec import parse_spec

GRID = tuple(step / 20 for step in range(14, 29))  # 0.7 to 1.4
_ROWS = 1  # of each batch: the weights of a long sequence are large


def divergences(
    original: Program, changed: Program, node: str, order: Tensor, batches: Sequence[Batch]
) -> Tensor:
    """Nats per query by temperature and head, float64 `[len(GRID), heads]`, of an attention that
    both programs have; head h of the changed one is head `order[h]` of the original."""
    total = torch.zeros(len(GRID), len(order), dtype=torch.float64)
    count = 0
    for batch in batches:
        expected = _weights(original, node, batch, (1.0,))[0][:, order]
        real = _real(batch, expected)
        for at, found in enumerate(_weights(changed, node, batch, GRID)):
            lost = torch.where(expected > 0, expected * (expected / found).log(), 0.0).sum(-1)
            rest, other = ((1 - x.sum(-1)).clamp(min=1e-30) for x in (expected, found))
            lost = lost + rest * (rest / other).log()  # of sinks, which are no keys
            total[at] += torch.where(real[:, None], lost, 0.0).double().sum((0, 2))
        count += int(real.sum())
    return total / max(count, 1)


def _real(batch: Batch, weights: Tensor) -> Tensor:
    """Which queries count, bool `[rows, S]`."""
    rows, _, queries, _ = weights.shape
    if batch.valid is None or batch.valid.shape[-1] != queries:
        return torch.ones(rows, queries, dtype=torch.bool)
    return batch.valid[:rows].bool()


def _weights(
    program: Program, node: str, batch: Batch, temperatures: Sequence[float]
) -> list[Tensor]:
    """The attention's weights `[rows, heads, S, T]` at each temperature, at least 1e-30."""
    q, k, _, extras, line = cast(tuple[Any, ...], program.node(node).args)
    spec = parse_spec(str(line))
    nodes: list[fx.Node] = [q, k, *extras]
    values = peek(program, [n.name for n in nodes], batch)
    first = [_few(n, values[n.name], q) for n in nodes]
    with torch.no_grad():
        return [
            attend.weights(first[0] * t, first[1], first[2:], spec).clamp(min=1e-30)
            for t in temperatures
        ]


def _few(node: fx.Node, value: Tensor, q: fx.Node) -> Tensor:
    """The first rows of a value with the batch of the queries."""
    whole = value.dim() > 1 and str(node.meta["val"].shape[0]) == str(q.meta["val"].shape[0])
    return value[:_ROWS] if whole else value
