"""Figures of attention maps, added up slice by slice in float64: entropy, mass on the first keys
and near the query, distance, and how alike the heads' maps are.

A row is a query's weights p_j over the keys it may read, brought to sum 1 (a learned sink logit
takes its share of a row beforehand; `no_key` is that share). With n keys to read, the entropy is
-sum p log p in nats, at most log n. A window of w keys keeps |i - j| < w; what it would drop beside
the first keys is `lost`. Rows that may read fewer than two keys say nothing and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.compiler.diagnostics.some_weights import Slice

SINK = 4  # StreamingLLM (Xiao et al. 2023): four first tokens take the mass of idle heads


class MapFigures:
    """Sums over the rows of one attention; `one_sequence` tells that queries and keys share
    positions, without which nothing is near or far."""

    def __init__(self, heads: int, widths: Sequence[int], one_sequence: bool, sink: int) -> None:
        self.widths, self.sink, self.one_sequence = tuple(widths), sink, one_sequence
        near = [f"{kind}_{width}" for width in self.widths for kind in ("local", "lost")]
        self.names = ["sink", *([*near, "distance"] if one_sequence else [])]
        self.sums = {
            name: torch.zeros(heads, dtype=torch.float64)
            for name in ("entropy", "entropy_share", "no_key", *self.names)
        }
        self.rows = torch.zeros(heads, dtype=torch.float64)
        self.gram = torch.zeros(heads, heads, dtype=torch.float64)
        self.queries = 0
        self.looks_ahead = False

    def add(self, part: Slice, real_keys: Tensor) -> None:
        """Add one slice of rows. `real_keys` bool `[T]`; first keys are counted among those."""
        weights, count = part.weights, part.visible.sum(-1)
        mass = weights.sum(-1)
        told = (count >= 2) & (mass > 0)
        p = weights / mass.clamp(min=torch.finfo(weights.dtype).tiny).unsqueeze(-1)
        p = p * told.unsqueeze(-1)
        entropy = torch.special.entr(p).sum(-1)
        self._sum("entropy", entropy)
        self._sum("entropy_share", entropy / count.clamp(min=2).log())
        self._sum("no_key", (1 - mass) * told)
        found = torch.einsum("hrt,rtf->hrf", p, self._wanted(part.i, real_keys).to(p.dtype))
        for at, name in enumerate(self.names):
            self._sum(name, found[..., at])
        self.rows += told.sum(-1)
        self.queries += int(told.any(0).sum())
        flat = p.flatten(1)
        self.gram += (flat @ flat.T).double()
        if self.one_sequence and not self.looks_ahead:
            ahead = torch.arange(part.visible.shape[-1])[None] > part.i[:, None]
            self.looks_ahead = bool((part.visible & ahead).any())

    def per_head(self) -> dict[str, Tensor]:
        """The means over rows by name, float64 `[heads]`; empty where no row was told."""
        if not bool(self.rows.all()):
            return {}
        return {name: total / self.rows for name, total in self.sums.items()}

    def similarity(self) -> Tensor:
        """Cosines between the heads' maps, `[heads, heads]`: 1 where two heads read alike."""
        norm = self.gram.diagonal().clamp(min=1e-300).sqrt()
        return self.gram / (norm[:, None] * norm[None, :])

    def _sum(self, name: str, value: Tensor) -> None:
        self.sums[name] += value.double().sum(-1)

    def _wanted(self, i: Tensor, real_keys: Tensor) -> Tensor:
        """What each weight counts for, by figure: `[R, T, figures]`."""
        rank = real_keys.long().cumsum(0) - 1
        first = ((rank < self.sink) & real_keys)[None].expand(len(i), -1)
        if not self.one_sequence:
            return first.unsqueeze(-1)
        away = (i[:, None] - torch.arange(len(real_keys))[None]).abs()
        made = [first]
        for width in self.widths:
            near = away < width
            made += [near, ~near & ~first]
        return torch.stack([*(x.float() for x in made), away.float()], dim=-1)
