"""Spectra and effective ranks of what a head computes with, from second moments alone.

A head's logits are x W_q W_k^T y, its output a V W_o: products of two factors A B^T, whose singular
values are those of S_a S_b with S S = the second moment of a factor. With the moments of weights
(A = W_q, B = W_k) this is the spectrum of the bilinear form, for rotary models at equal positions
(the part free of position); with the moments of the operands as the attention meets them, rotary
included, it is the spectrum of the logits over all pairs of tokens.

Sources: effective rank is the exponential of the entropy of the spectrum (Roy & Vetterli 2007,
definition 1), here of energies s^2 / sum s^2, so that it is to be read beside the rank that holds
99% of the energy; the product of moments is that of KQ-SVD.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENERGY = 0.99


def product(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of A B^T per head, descending `[heads, dim]`, from A^T A and B^T B
    `[heads, dim, dim]` float64."""
    values: Tensor = torch.linalg.svdvals(_root(left) @ _root(right))
    return values


def spectrum(moment: Tensor) -> Tensor:
    """Singular values of X, descending `[..., dim]`, from X^T X `[..., dim, dim]` float64."""
    energies: Tensor = torch.linalg.eigvalsh(_symmetric(moment))
    return energies.clamp(min=0).sqrt().flip(-1)


def shares(values: Tensor) -> Tensor:
    """Singular values brought to squares that add up to 1; zeros stay zeros."""
    return values / values.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-300)


def effective_rank(values: Tensor) -> Tensor:
    """exp(entropy of the energies) of singular values `[..., dim]`; 0 for a form that is zero."""
    energy = shares(values).square()
    found = torch.special.entr(energy).sum(-1).exp()
    return torch.where(energy.sum(-1) > 0, found, torch.zeros_like(found))


def rank_of_energy(values: Tensor, share: float = ENERGY) -> Tensor:
    """How many singular values `[..., dim]`, descending, hold this share of the energy; float64."""
    energy = shares(values).square()
    short = energy.cumsum(-1) < share - 1e-12
    found = short.sum(-1) + 1
    return torch.where(energy.sum(-1) > 0, found.clamp(max=values.shape[-1]), 0).double()


def _root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(_symmetric(moment))
    scaled: Tensor = vectors * values.clamp(min=0).sqrt()[..., None, :]
    made: Tensor = scaled @ vectors.transpose(-1, -2)
    return made


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.transpose(-1, -2)) / 2
