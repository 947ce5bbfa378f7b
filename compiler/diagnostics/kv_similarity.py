"""How alike key/value heads are once each is turned as the attention allows: what merging two would
keep.

For heads h and g, one shared head with the best map back to each loses a share of their weighted
energy (the closed forms of `attnopt.compiler.shared_heads`); the similarity is 1 - 2 * that share:
1 for heads that are equal up to their gauge, 0 for heads of one size with nothing in common. The
gauge is one complex number per rotary pair (weighted by the query's energy on it) and any matrix on
the other dims and on values. All pairs at once, from the second moments of all heads together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.compiler.gauge import unpaired
from attnopt.compiler.shared_heads import root


def of_keys(moment: Tensor, heads: int, query: Tensor, pairs: Tensor) -> Tensor:
    """Similarity of keys, `[heads, heads]`.

    `moment` `[heads * dim, heads * dim]` of all heads' keys before rotary, `query`
    `[heads, dim, dim]` second moments of the queries that read each head, `pairs` `[pairs, 2]`.
    """
    dim = len(moment) // heads
    blocks = moment.reshape(heads, dim, heads, dim)
    lost = torch.zeros(heads, heads, dtype=torch.float64)
    total = torch.zeros(heads, dtype=torch.float64)
    for a, b in pairs.tolist():
        power = ((query[:, a, a] + query[:, b, b]) / 2).clamp(min=0).sqrt()
        real = blocks[:, a, :, a] + blocks[:, b, :, b]
        imaginary = blocks[:, b, :, a] - blocks[:, a, :, b]
        own = power.square() * real.diagonal()
        cross = (real.square() + imaginary.square()) * (power[:, None] * power[None, :]).square()
        half = (own[:, None] - own[None, :]) / 2
        lost += (own[:, None] + own[None, :]) / 2 - (half.square() + cross).sqrt()
        total += own
    rest = unpaired(dim, pairs)
    if len(rest):
        part = blocks[:, rest][:, :, :, rest]
        metric = root(query[:, rest[:, None], rest[None, :]])
        more, size = _stacked(part, metric)
        lost, total = lost + more, total + size
    return _similar(lost, total)


def of_values(moment: Tensor, heads: int, metric: Tensor) -> Tensor:
    """Similarity of values, `[heads, heads]`; `metric` `[heads, dim, dim]` is the root of what the
    output projection makes of each head."""
    dim = len(moment) // heads
    return _similar(*_stacked(moment.reshape(heads, dim, heads, dim), metric))


def _stacked(blocks: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """The energy that the best shared head of each two loses, and each head's own."""
    heads, dim = blocks.shape[:2]
    weighed = torch.einsum("hde,hegf,gcf->hgdc", metric, blocks, metric)
    own = weighed.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    lost = torch.zeros(heads, heads, dtype=torch.float64)
    for h in range(heads - 1):
        many = heads - h - 1
        top = torch.cat((own[h].expand(many, dim, dim), weighed[h, h + 1 :]), dim=2)
        low = torch.cat((weighed[h, h + 1 :].transpose(1, 2), own[h + 1 :]), dim=2)
        values = torch.linalg.eigvalsh(torch.cat((top, low), dim=1))
        lost[h, h + 1 :] = lost[h + 1 :, h] = values[:, :dim].clamp(min=0).sum(-1)
    return lost, own.diagonal(dim1=1, dim2=2).sum(-1)


def _similar(lost: Tensor, total: Tensor) -> Tensor:
    both = (total[:, None] + total[None, :]).clamp(min=1e-300)
    made = (1 - 2 * lost / both).clamp(0, 1)
    made.fill_diagonal_(1.0)
    return made
