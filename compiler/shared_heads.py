"""One key or value head in the place of several: the closed forms, on second moments alone.

A head is y_h = W_h x with x `[width + 1]` (a constant 1 last, so that W_h `[dim, width + 1]`
carries the bias). A group of heads gets one shared head s = W x and a map per head, y_h ~ T_h s.
The map costs nothing: q.k_h ~ (T_h^T q).s moves it into the query, a v_h W_o ~ a s T_h^T W_o moves
it into the output projection. What T_h may be is the gauge (`attnopt.compiler.gauge`).

* Any matrix (values; keys without rotary): stack the group's heads, weighted by a metric S_h, and
  keep the top principal directions P: s = P^T [S_h y_h], T_h = S_h^-1 P_h. The metric of values is
  (sum W_o W_o^T)^1/2 over the query heads that read them, that of keys the root of those query
  heads' second moment. Optimal for the weighted error.
* Complex scalars (a rotary pair): with z_h = e_h (a + ib), e_h the rms of the query on the pair,
  and u the top eigenvector of sum z z^H: s = sum_h conj(u_h) z_h, T_h = u_h / e_h. Optimal among
  one complex number per head and pair.
* Unit complex scalars (a norm follows): the phases of u, on heads brought to equal energy.
* Nothing: the mean, T_h = 1 (Ainslie et al. 2023, the baseline).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.compiler.gauge import Freedom, unpaired

# Of a metric's mean diagonal, so that directions that calibration never saw keep their place.
_DAMPING = 1e-6


@dataclass(frozen=True)
class Shared:
    """The shared heads of all groups and the way back to the old ones, all float64.

    `weight` `[groups, dim, width + 1]`, `expand` `[heads, dim, dim]`; `metric` `[heads, dim, dim]`
    weighs the error; `tail` is the predicted share of weighted energy lost, None without one.
    """

    weight: Tensor
    expand: Tensor
    metric: Tensor
    tail: float | None = None

    def residual(self, heads: Tensor, gram: Tensor) -> float:
        """Weighted share of energy lost for heads `[heads, dim, width + 1]` on inputs with this
        Gram.
        """
        size = len(heads) // len(self.weight)
        lost = heads - self.expand @ self.weight.repeat_interleave(size, dim=0)
        return _energy(self.metric @ lost, gram) / max(_energy(self.metric @ heads, gram), 1e-300)


def mean(heads: Tensor, groups: int, metric: Tensor) -> Shared:
    """The plain mean of each group of adjacent heads."""
    count, dim, _ = heads.shape
    weight = heads.reshape(groups, count // groups, dim, -1).mean(1)
    expand = torch.eye(dim, dtype=torch.float64).expand(count, dim, dim)
    return Shared(weight, expand, metric)


def principal(heads: Tensor, gram: Tensor, groups: int, metric: Tensor) -> Shared:
    """Any matrix per head: weighted principal components of each group's stacked heads."""
    count, dim, _ = heads.shape
    size = count // groups
    weights, maps, kept, total = [], [], 0.0, 0.0
    for group in range(groups):
        members = slice(group * size, (group + 1) * size)
        stacked = (metric[members] @ heads[members]).reshape(size * dim, -1)
        values, vectors = torch.linalg.eigh(_symmetric(stacked @ gram @ stacked.T))
        top = vectors[:, -dim:]
        level = float(metric[members].diagonal(dim1=1, dim2=2).mean())  # keeps the usual magnitude
        weights.append(top.T @ stacked / level)
        maps.append(torch.linalg.solve(metric[members], top.reshape(size, dim, dim)) * level)
        kept, total = kept + float(values[-dim:].sum()), total + float(values.sum())
    tail = max(0.0, 1.0 - kept / max(total, 1e-300))
    return Shared(torch.stack(weights), torch.cat(maps), metric, tail)


def keys(
    heads: Tensor, gram: Tensor, groups: int, query: Tensor, pairs: Tensor, free: Freedom
) -> Shared:
    """Shared keys, each part of a head by what its gauge allows.

    `heads` `[heads, dim, width + 1]` before rotary; `query` `[heads, dim, dim]` second moments of
    the queries that read each key head, before rotary; `pairs` `[pairs, 2]` the rotary pairs.
    """
    count, dim, _ = heads.shape
    metric = _key_metric(query, pairs, free)
    found = mean(heads, groups, metric)
    weight, expand = found.weight.clone(), found.expand.clone()
    size = count // groups
    rest = unpaired(dim, pairs)
    lost = 0.0
    if free.pairs != "none":
        level = _levels(heads, gram) if free.pairs == "turn" else None
        for pair in pairs:
            lost += _pair(heads, gram, metric, size, pair, level, weight, expand)
    if len(rest) and free.rest:
        at = rest[:, None], rest[None, :]
        part = principal(heads[:, rest], gram, groups, metric[:, at[0], at[1]])
        weight[:, rest] = part.weight
        expand[:, at[0], at[1]] = part.expand
        lost += (part.tail or 0.0) * _energy(metric[:, at[0], at[1]] @ heads[:, rest], gram)
    proved = (free.pairs == "scale" or not len(pairs)) and (free.rest or not len(rest))
    total = max(_energy(metric @ heads, gram), 1e-300)
    return Shared(weight, expand, metric, lost / total if proved else None)


def root(moment: Tensor) -> Tensor:
    """The damped symmetric square root of second moments `[..., dim, dim]`."""
    level = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    level = level.clamp(min=1e-30 + 1e-12 * float(level.max()))
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype)
    values, vectors = torch.linalg.eigh(_symmetric(moment) + _DAMPING * level * eye)
    scaled: Tensor = vectors * values.clamp(min=0).sqrt()[..., None, :]
    made: Tensor = scaled @ vectors.transpose(-1, -2)
    return made


def _pair(
    heads: Tensor,
    gram: Tensor,
    metric: Tensor,
    size: int,
    pair: Tensor,
    level: Tensor | None,
    weight: Tensor,
    expand: Tensor,
) -> float:
    """Fill in one rotary pair of all groups; answers the weighted energy it loses.

    `level` is set when only turns pass.
    """
    a, b = int(pair[0]), int(pair[1])
    number = torch.complex(heads[:, a], heads[:, b])
    energy = metric[:, a, a] if level is None else 1.0 / level
    weighted = energy[:, None] * number
    lost = 0.0
    for group in range(len(weight)):
        members = range(group * size, (group + 1) * size)
        z = weighted[members[0] : members[-1] + 1]
        moment = z @ gram.to(z.dtype) @ z.conj().T
        values, vectors = torch.linalg.eigh(moment)
        u = vectors[:, -1]
        if level is not None:
            u = torch.polar(torch.full((size,), size**-0.5, dtype=torch.float64), u.angle())
        own = energy[members[0] : members[-1] + 1]
        scale = float(own.square().mean().sqrt()) * (1.0 if level is None else size**0.5)
        shared = u.conj() @ z / scale
        factors = u * scale / own if level is None else u / u.abs()
        weight[group, a], weight[group, b] = shared.real, shared.imag
        for h, factor in zip(members, factors, strict=True):
            expand[h, a, a] = expand[h, b, b] = factor.real
            expand[h, a, b], expand[h, b, a] = -factor.imag, factor.imag
        lost += float(values[:-1].sum().clamp(min=0))
    return lost


def _key_metric(query: Tensor, pairs: Tensor, free: Freedom) -> Tensor:
    """How errors of a key weigh in the logits.

    Rms of the query per rotary pair, root of its moment on the other dims.
    """
    count, dim, _ = query.shape
    metric = torch.zeros(count, dim, dim, dtype=torch.float64)
    rest = unpaired(dim, pairs)
    if len(rest):
        at = rest[:, None], rest[None, :]
        metric[:, at[0], at[1]] = root(query[:, at[0], at[1]])
    a, b = pairs[:, 0], pairs[:, 1]
    power = (query[:, a, a] + query[:, b, b]) / 2
    floor = 1e-30 + 1e-12 * float(query.diagonal(dim1=1, dim2=2).max())
    energy = power.clamp(min=floor).sqrt()
    metric[:, a, a] = energy
    metric[:, b, b] = energy
    return metric


def _levels(heads: Tensor, gram: Tensor) -> Tensor:
    """The rms norm of each head, `[heads]`."""
    power = torch.einsum("hdp,pq,hdq->h", heads, gram, heads)
    return power.clamp(min=1e-30).sqrt()


def _energy(heads: Tensor, gram: Tensor) -> float:
    return float(torch.einsum("hdp,pq,hdq->", heads, gram, heads))


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.transpose(-1, -2)) / 2
