"""Keys and values as a cache would hold them: all heads of a site together, keys before rotary.

[K, V] of all key/value heads is a linear map of the token. Its rank is the width that a latent
cache would need, each of K and V brought to the same energy (as TransMLA balances them, 2025,
arXiv 2502.07864). The same moments say how alike the heads are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.diagnostics import kv_similarity
from attnopt.compiler.diagnostics.centred import Centred
from attnopt.compiler.diagnostics.spectra import effective_rank, rank_of_energy, spectrum
from attnopt.compiler.grams import real, rows
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.shared_heads import root
from attnopt.compiler.site import Path, Site
from attnopt.compiler.site_weights import read_output
from attnopt.compiler.spec import AttentionSpec

MOST_COLUMNS = 4096  # of [K, V]; their second moments take 8 * columns^2 bytes per site


@dataclass
class KVFigures:
    """Figures by name as in `SiteDiagnosis`; `spectrum` is that of [K, V] as one."""

    per_head: dict[str, Tensor] = field(default_factory=dict)
    similarity: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    spectrum: Tensor | None = None
    missing: dict[str, str] = field(default_factory=dict)


class KVReader:
    """Watches the key and the value projection of one site (one node, where they are fused)."""

    def __init__(self, program: Program, site: Site) -> None:
        self.program, self.site = program, site
        self.held: dict[str, Tensor] = {}
        self.paths: dict[str, Path] = {}
        self.reason = _reason(site)
        if not self.reason:
            assert site.k is not None and site.v is not None
            self.paths = {"k": site.k, "v": site.v}
            self.sizes = [path.channels.numel() for path in self.paths.values()]
            self.reason = _too_wide(sum(self.sizes))
        if not self.reason:
            self.joint = Centred(1, sum(self.sizes))

    @property
    def nodes(self) -> set[str]:
        """The nodes to watch; none where nothing can be measured."""
        return set() if self.reason else {path.projection for path in self.paths.values()}

    def see(self, node: str, value: Any, batch: Batch) -> None:
        """Take what one projection made of a batch."""
        for which, path in self.paths.items():
            if path.projection == node:
                tokens = rows(value, real(self.program, node, batch))
                self.held[which] = tokens[:, path.channels.reshape(-1)]
        if len(self.held) == 2:
            k, v = (self.held[which].double() for which in self.paths)
            self.held.clear()
            if len(k) != len(v):  # a memory that all sequences share on one side alone
                self.reason = f"{len(k)} tokens make keys, {len(v)} make values"
                return
            self.joint.add(torch.cat((k, v), dim=1)[:, None])

    def figures(self, query: Tensor, spec: AttentionSpec) -> KVFigures:
        """What was found. `query` `[heads, dim, dim]` are the queries' second moments as the
        attention meets them."""
        if self.reason:
            return KVFigures(missing={"kv": self.reason, "similarity": self.reason})
        heads, (split, _) = self.site.kv_heads, self.sizes
        moment = self.joint.moment()[0]
        k, v = moment[:split, :split], moment[split:, split:]
        found = KVFigures()
        energies = spectrum(_balanced(moment, split))
        found.spectrum = energies
        found.whole = {
            "kv_rank": round(float(effective_rank(energies)), 3),
            "kv_rank99": float(rank_of_energy(energies)),
            "kv_columns": float(len(moment)),
        }
        each = torch.stack([_one_head(moment, split, heads, head) for head in range(heads)])
        found.per_head = {
            "kv_rank": effective_rank(spectrum(each)),
            "kv_rank99": rank_of_energy(spectrum(each)),
        }
        found.similarity["values"] = kv_similarity.of_values(
            v, heads, self._metric(len(v) // heads)
        )
        if "rotary" in self.site.missing:
            found.missing["keys"] = f"the rotary embedding: {self.site.missing['rotary']}"
            return found
        pairs = self.site.rotary.pairs if self.site.rotary else torch.empty(0, 2).long()
        read = query.reshape(heads, -1, *query.shape[1:]).sum(1)
        found.similarity["keys"] = kv_similarity.of_keys(k, heads, read, pairs)
        return found

    def _metric(self, dim: int) -> Tensor:
        """What the output projection makes of each value head; the identity where unknown."""
        heads = self.site.kv_heads
        if self.site.out is None:
            return torch.eye(dim, dtype=torch.float64).expand(heads, dim, dim)
        out = read_output(self.program, self.site.out)
        return root((out @ out.transpose(1, 2)).reshape(heads, -1, dim, dim).sum(1))


def _reason(site: Site) -> str:
    lacking = [which for which in ("k", "v") if getattr(site, which) is None]
    if lacking:
        said = site.missing.get(lacking[0], "it was not found")
        return f"the projection of {lacking[0]}: {said}"
    return ""


def _too_wide(columns: int) -> str:
    if columns <= MOST_COLUMNS:
        return ""
    return f"{columns} columns of keys and values, at most {MOST_COLUMNS} are measured"


def _balanced(moment: Tensor, split: int) -> Tensor:
    """Keys and values brought to the same energy."""
    diagonal = moment.diagonal()
    level = torch.ones_like(diagonal)
    for part in (slice(0, split), slice(split, None)):
        level[part] = diagonal[part].sum().clamp(min=1e-300).rsqrt()
    return moment * level[:, None] * level[None, :]


def _one_head(moment: Tensor, split: int, heads: int, head: int) -> Tensor:
    """The part of `[K, V]`'s moments that belongs to one head, balanced."""
    k, v = split // heads, (len(moment) - split) // heads
    at = torch.cat((torch.arange(head * k, (head + 1) * k),
                    torch.arange(split + head * v, split + (head + 1) * v)))  # fmt: skip
    return _balanced(moment[at][:, at], k)
