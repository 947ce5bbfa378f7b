"""Heads of fewer dims in closed form, on second moments alone.

* Values and output. What a head gives is z = a V; its rows Z reach the output through W_o. With S
  the root of W_o W_o^T (summed over the query heads of a key/value head) and P the top principal
  directions of S Z^T Z S, the map z -> z S P P^T S^-1 is the best of its rank: W_v <- W_v S P and
  W_o <- P^T S^-1 W_o. What is lost is the tail of the eigenvalues.
* Queries and keys in no rotary pair ("KQ-SVD"). With roots L_q, L_k of the moments of q and k and
  the SVD L_q L_k = U Sigma V^T, A = L_q^-1 U_r Sigma_r^1/2 and B = L_k^-1 V_r Sigma_r^1/2: no
  product (Q A)(K B)^T of this rank is nearer to the logits Q K^T (Eckart and Young 1936). Query
  heads that share a key are one set of rows.
* Rotary pairs. Rotary turns each pair by an angle of its own, so pairs stay or go as a whole, and
  for all heads alike, since heads share the tables: those with the least sum over heads of
  E|q|^2 E|k|^2 / 2 go, the energy of their logits where phases are even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.compiler.gauge import unpaired

_SEEN = 1e-14  # of the largest eigenvalue: below it is rounding


@dataclass(frozen=True)
class Basis:
    """A smaller basis for each key/value head and the way back, float64.

    What `down` `[kv_heads, dim, less]` does to a row, `up` `[kv_heads, less, dim]` undoes as well
    as can be; `tail` is the share of weighted energy lost, `lost` and `energy` its parts.
    """

    down: Tensor
    up: Tensor
    lost: float
    energy: float

    @property
    def tail(self) -> float:
        """The share of weighted energy lost."""
        return self.lost / max(self.energy, 1e-300)


def values(results: Tensor, weight: Tensor, dims: int) -> Basis:
    """The basis for what heads give.

    `results` `[kv_heads, v_dim, v_dim]` are second moments of the rows Z of the query heads of each
    key/value head, `weight` the same of the rows' readers, the sum of W_o W_o^T.
    """
    root, back = roots(weight)
    found, vectors = torch.linalg.eigh(_symmetric(root @ results @ root))
    top = vectors[..., -dims:]
    lost = float(found[..., :-dims].clamp(min=0).sum())
    return Basis(root @ top, top.mT @ back, lost, float(found.clamp(min=0).sum()))


def logits(query: Tensor, key: Tensor, dims: int) -> tuple[Tensor, Tensor, float, float]:
    """Maps A and B `[kv_heads, rest, dims]` of queries and keys, and the energy of the logits over
    all pairs of rows: what is lost, and all of it. `query` and `key` `[kv_heads, rest, rest]` are
    second moments."""
    (l_q, b_q), (l_k, b_k) = roots(query), roots(key)
    u, sigma, v = torch.linalg.svd(l_q @ l_k)
    scale = sigma[..., None, :dims].sqrt()
    a, b = b_q @ u[..., :dims] * scale, b_k @ v.mT[..., :dims] * scale
    return a, b, float(sigma[..., dims:].square().sum()), float(sigma.square().sum())


def pair_energies(query: Tensor, key: Tensor, pairs: Tensor) -> Tensor:
    """The energy of the logits of each rotary pair, summed over heads, `[pairs]`."""
    power = []
    for moment in (query, key):
        own = moment.diagonal(dim1=1, dim2=2)
        power.append(own[:, pairs[:, 0]] + own[:, pairs[:, 1]])
    energy: Tensor = (power[0] * power[1]).sum(0) / 2
    return energy


@dataclass(frozen=True)
class Keys:
    """Smaller queries and keys: `kept` are the dims that stay, ascending, `pairs` which rotary
    pairs; `a` and `b` `[kv_heads, rest, less]` map the dims in no pair onto the first of them."""

    kept: Tensor
    pairs: Tensor
    rest: Tensor
    a: Tensor
    b: Tensor
    lost: float
    energy: float

    @property
    def tail(self) -> float:
        """The share of the logits' energy lost."""
        return self.lost / max(self.energy, 1e-300)

    def query(self, heads: Tensor) -> Tensor:
        """Query projections `[heads, dim, width]` with fewer dims."""
        return self._mapped(heads, self.a.repeat_interleave(len(heads) // len(self.a), dim=0))

    def key(self, heads: Tensor) -> Tensor:
        """Key projections `[kv_heads, dim, width]` with fewer dims."""
        return self._mapped(heads, self.b)

    def _mapped(self, heads: Tensor, by: Tensor) -> Tensor:
        made = heads.clone()
        made[:, self.rest[: by.shape[-1]]] = by.mT @ heads[:, self.rest]
        return made[:, self.kept]


def keys(query: Tensor, key: Tensor, pairs: Tensor, dims: int) -> Keys:
    """The best queries and keys of `dims` dims, rotary pairs and other dims losing the same share.

    `query` and `key` `[kv_heads, dim, dim]` are second moments before rotary, `pairs` `[pairs, 2]`.
    """
    dim = key.shape[-1]
    rest = unpaired(dim, pairs)
    count = min(len(pairs), max(min(1, len(pairs)), round(dims * len(pairs) / dim)))
    others = dims - 2 * count
    if not 0 <= others <= len(rest) or (len(rest) and not others):
        raise ValueError(f"{dims} dims are not {count} pairs and some of {len(rest)} other dims")
    power = pair_energies(query, key, pairs)
    chosen = power.argsort(descending=True)[:count].sort().values
    at = rest[:, None], rest[None, :]
    a, b, lost, energy = logits(query[:, at[0], at[1]], key[:, at[0], at[1]], others)
    kept = torch.cat((pairs[chosen].reshape(-1), rest[:others])).sort().values
    lost += float(power.sum() - power[chosen].sum())
    return Keys(kept, chosen, rest, a, b, lost, energy + float(power.sum()))


def phase_mean(moment: Tensor, pairs: Tensor) -> Tensor:
    """Second moments `[..., dim, dim]` as they are on average over all phases of rotary pairs
    `[pairs, 2]`: each pair's energy in equal parts, and nothing shared with other dims."""
    made, paired = moment.clone(), pairs.reshape(-1)
    power = moment.diagonal(dim1=-2, dim2=-1)[..., pairs].mean(-1, keepdim=True)
    made[..., paired, :] = 0.0
    made[..., :, paired] = 0.0
    made[..., paired, paired] = power.expand(*power.shape[:-1], 2).flatten(-2)
    return made


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of second moments `[..., dim, dim]` and its pseudo-inverse."""
    found, vectors = torch.linalg.eigh(_symmetric(moment))
    if not found.numel():
        return moment, moment
    seen = found > _SEEN * found[..., -1:].clamp(min=1e-300)
    size = torch.where(seen, found, torch.zeros_like(found)).sqrt()
    inverse = torch.where(seen, 1 / size.clamp(min=1e-300), torch.zeros_like(size))
    return (vectors * size[..., None, :]) @ vectors.mT, (
        vectors * inverse[..., None, :]
    ) @ vectors.mT


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2
