"""Keys and values of all heads through one latent: the closed forms, on second moments alone.

Keys of head m are k_m = K_m x, values v_m = V_m x, with x `[width + 1]` (a constant 1 last). A
rotary pair is one complex number; rotary multiplies it by exp(i position frequency).

* Rotary slots: for one frequency, the numbers of all heads z = (e_m k_m)_m, e_m the rms of the
  queries, are turned by one factor, so any unitary map among heads commutes with rotary (in
  TransMLA's RoRoPE, Meng et al. 2025, section 4.2, a real orthogonal one). The principal directions
  u of z hold most of its energy: the slots s = u^H z with the most keep their rotary, shared by all
  heads, k_m ~ (u_m / e_m) s. `fold` neighbouring frequencies are taken for one (FreqFold). Evenly
  spread, each such block keeps its principal one, which turns with the highest frequency of the
  block: for theta^(-j / pairs) these are theta^(-i / blocks), those of a smaller rotary embedding.
* The rest of the keys loses its rotary, which is the approximate step. It and the values are maps
  of one latent c = P^T [S_k rest / a; S_v V / b] x, the principal components of both at equal
  energy, with the metrics S of the logits and of the output. Exact where the rank of what is mapped
  is not larger than the latent's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.compiler.head_dims import roots


@dataclass(frozen=True)
class Slots:
    """Rotary numbers that all heads share, float64 and complex128.

    `pair` int64 `[slots]` is the rotary pair whose frequency a slot turns with, `key` `[slots,
    width + 1]` makes it of x, and `factors` `[slots, heads, pairs]` give its part in each head's
    pairs. `energy` is the share of the keys' rotary energy that they hold.
    """

    pair: Tensor
    key: Tensor
    factors: Tensor
    energy: float


def slots(
    heads: Tensor, gram: Tensor, query: Tensor, pairs: Tensor, frequencies: Tensor, count: int,
    fold: int = 1, real: bool = False, even: bool = False,
) -> Slots:  # fmt: skip
    """The `count` slots with the most energy; with `even` the one of each block of `fold`.

    `heads` `[heads, dim, width + 1]` keys before rotary; `gram` `[width + 1, width + 1]`; `query`
    `[heads, dim, dim]` second moments of the queries that read them; `pairs` `[pairs, 2]`. `fold`
    frequencies are taken for one; `real` allows real maps among heads alone.
    """
    a, b = pairs[:, 0], pairs[:, 1]
    number = torch.complex(heads[:, a], heads[:, b])  # [heads, pairs, width + 1]
    if not count:
        none = number.new_zeros
        return Slots(torch.zeros(0).long(), none(0, heads.shape[2]), none(0, *number.shape[:2]), 0)
    power = (query[:, a, a] + query[:, b, b]) / 2
    level = power.clamp(min=1e-30 + 1e-12 * float(power.max())).sqrt()
    found: list[tuple[float, Tensor, Tensor, int]] = []
    total = 0.0
    for block in frequencies.argsort().split(fold):
        e = level[:, block].reshape(-1)
        z = number[:, block].reshape(len(e), -1) * e[:, None]
        moment = z @ gram.to(z.dtype) @ z.conj().T
        values, vectors = torch.linalg.eigh(moment.real if real else moment)
        total += float(values.sum())
        every = list(zip(values, vectors.T.to(z.dtype), strict=True))
        for value, u in every[-1:] if even else every:
            factors = torch.zeros(len(heads), len(pairs), dtype=z.dtype)
            factors[:, block] = (u / e).reshape(len(heads), -1)
            found.append((float(value), u.conj() @ z, factors, int(block[-1])))
    found.sort(key=lambda item: -item[0])
    kept = found[:count]
    factors = torch.stack([item[2] for item in kept])
    # Of several frequencies taken for one, the one with the most energy stands for them.
    share = (factors.abs() * level).square().sum(1)
    pair = torch.tensor([item[3] for item in kept]) if even else share.argmax(1)
    usual = level.mean()  # keeps the usual magnitude
    return Slots(
        pair, torch.stack([item[1] for item in kept]) / usual, factors * usual,
        sum(item[0] for item in kept) / max(total, 1e-300),
    )  # fmt: skip


def average(heads: Tensor, pairs: Tensor, count: int, given: Tensor | None = None) -> Slots:
    """As `slots`, from the weights alone: the mean over the heads, of the pairs where it is largest
    (X-EcoMLA, Li et al. 2025, takes the mean of the last rows), or of the `given` ones."""
    number = torch.complex(heads[:, pairs[:, 0]], heads[:, pairs[:, 1]])
    mean = number.mean(0)
    norms = mean.abs().square().sum(1)
    chosen = norms.argsort(descending=True)[:count] if given is None else given
    factors = torch.zeros(len(chosen), len(heads), len(pairs), dtype=number.dtype)
    factors[torch.arange(len(chosen)), :, chosen] = 1.0
    total = max(float(number.abs().square().sum()), 1e-300)
    energy = float(norms[chosen].sum()) * len(heads) / total
    return Slots(chosen, mean[chosen], factors, energy)


def without(heads: Tensor, pairs: Tensor, kept: Slots) -> Tensor:
    """What the slots leave of keys `[heads, dim, width + 1]`."""
    rest = heads.clone()
    taken = torch.einsum("shp,sw->hpw", kept.factors, kept.key)
    rest[:, pairs[:, 0]] -= taken.real
    rest[:, pairs[:, 1]] -= taken.imag
    return rest


@dataclass(frozen=True)
class Latent:
    """The latent and its maps, float64: `down` `[rank, width]`, `up_k` `[heads, dim, rank]`, `up_v`
    `[heads, v_dim, rank]`, biases `[heads, dim]` and `[heads, v_dim]`.

    `k_tail` and `v_tail` are the shares of weighted energy about the mean that are lost.
    """

    down: Tensor
    up_k: Tensor
    up_v: Tensor
    k_bias: Tensor
    v_bias: Tensor
    k_tail: float
    v_tail: float


@dataclass(frozen=True)
class Components:
    """One latent for several sets of heads, float64: `down` `[rank, width]` makes it; `up` (each
    `[heads, dim, rank]`) and `bias` (`[heads, dim]`) make the heads of it; `tails` are the shares
    of their weighted energies about the mean that are lost."""

    down: Tensor
    up: tuple[Tensor, ...]
    bias: tuple[Tensor, ...]
    tails: tuple[float, ...]


def joint(
    keys: Tensor, values: Tensor, gram: Tensor, k_metric: Tensor, v_metric: Tensor, rank: int
) -> Latent:
    """The best latent of a rank for keys `[heads, dim, width + 1]` and values `[heads, v_dim,
    width + 1]` on inputs of this Gram; metrics are `[heads, dim, dim]` and symmetric."""
    made = components(((keys, k_metric), (values, v_metric)), gram, rank)
    (up_k, up_v), (k_bias, v_bias), (k_tail, v_tail) = made.up, made.bias, made.tails
    return Latent(made.down, up_k, up_v, k_bias, v_bias, k_tail, v_tail)


def components(
    parts: Sequence[tuple[Tensor, Tensor]], gram: Tensor, rank: int, shares: Sequence[float] = ()
) -> Components:
    """The principal components of several sets of heads: each `[heads, dim, width + 1]` with its
    metric, `[heads, dim, dim]` and symmetric. They are brought to the energies `shares`, equal
    ones where none are given."""
    mean, spread = _centred(gram)
    weighted, scales = [], []
    shares = shares or [1.0] * len(parts)
    for (heads, metric), share in zip(parts, shares, strict=True):
        part = (metric @ heads[..., :-1]).flatten(0, 1)
        energy = float(torch.einsum("ap,pq,aq->", part, spread, part))
        scales.append((max(energy, 1e-300) / share) ** 0.5)
        weighted.append(part / scales[-1])
    stacked = torch.cat(weighted)
    moment = stacked @ spread @ stacked.T
    energies, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    kept, lost = vectors[:, -rank:], vectors[:, :-rank]
    usual = float(gram[-1, -1]) ** 0.5  # makes the latent's numbers of the order of one
    down = kept.T @ stacked * usual
    missed = lost.square() @ energies[:-rank].clamp(min=0)
    made, biases, tails = [], [], []
    for (heads, metric), share, scale, rows, loss in zip(
        parts, shares, scales,
        kept.split([len(part) for part in weighted]),
        missed.split([len(part) for part in weighted]),
        strict=True,
    ):  # fmt: skip
        back = rows.reshape(*heads.shape[:2], -1) * (scale / usual)
        up = torch.linalg.solve(metric, back)
        made.append(up)
        biases.append(heads[..., -1] + (heads[..., :-1] - up @ down) @ mean)
        tails.append(float(loss.sum()) / share if scale > 1e-100 else 0.0)
    return Components(down, tuple(made), tuple(biases), tuple(tails))


def spectrum(
    parts: Sequence[tuple[Tensor, Tensor]], gram: Tensor, shares: Sequence[float] = ()
) -> Tensor:
    """The energies of the principal components of `components`, ascending `[width]`; cheaper where
    the heads are wider than what they read."""
    _, spread = _centred(gram)
    root, _ = roots(spread)
    total = torch.zeros_like(spread)
    for (heads, metric), share in zip(parts, shares or [1.0] * len(parts), strict=True):
        part = (metric @ heads[..., :-1]).flatten(0, 1) @ root
        total += part.T @ part * (share / part.square().sum().clamp(min=1e-300))
    found: Tensor = torch.linalg.eigvalsh(total).clamp(min=0)
    return found


def residual(heads: Tensor, up: Tensor, down: Tensor, gram: Tensor, metric: Tensor) -> float:
    """Weighted share of energy about the mean that heads lose on inputs of this Gram."""
    _, spread = _centred(gram)
    whole = (metric @ heads[..., :-1]).flatten(0, 1)
    lost = (metric @ (heads[..., :-1] - up @ down)).flatten(0, 1)
    energy, missed = (float(torch.einsum("ap,pq,aq->", x, spread, x)) for x in (whole, lost))
    return missed / max(energy, 1e-300)


def _centred(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of x and its second moments about it, from a Gram with the constant last."""
    mean = gram[:-1, -1] / gram[-1, -1]
    return mean, gram[:-1, :-1] - gram[-1, -1] * torch.outer(mean, mean)
