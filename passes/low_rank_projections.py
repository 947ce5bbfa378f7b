"""Projections of low rank: W becomes W_a W_b, two products that cost less than one.

The rank-r map that is nearest to x W on the data, not to W, is W P P^T with P the top r principal
directions of the rows x W, the eigenvectors of W^T C W for C = sum x^T x: W_a = W P, W_b = P^T.
Whitening C by a Cholesky factor or a square root leads to the same optimum. The relative error is
known beforehand, the root of the tail of the eigenvalues over their sum. A bias stays what it is.

A projection that makes queries, keys and values in one product is one matrix here. `keep` is the
share of its multiply-adds that stays, so that rank = keep in out / (in + out). With
`ranks="decay"` the projections of a site share the same number of products by how fast their
eigenvalues fall, the steepest first. Run `refit` afterwards. Sources: SVD-LLM (arXiv 2403.07378),
section 3, in the form of principal components; CARE, equation 1 (decay).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, choice
from attnopt.compiler.grams import Gram, moments
from attnopt.compiler.program import Program
from attnopt.compiler.raising.projections import projection
from attnopt.compiler.regions import Part
from attnopt.compiler.site import OutputPath, Path, Site, WeightLayout
from attnopt.compiler.site_weights import rewired

aten = torch.ops.aten
_PARTS = {"all": ("q", "k", "v", "out"), "qk": ("q", "k"), "vo": ("v", "out")}
_STEP = 8  # ranks from twice this on are multiples of it


@dataclass(frozen=True)
class LowRankProjections(Pass):
    """Keep this share of the products of the projections that make queries and keys ("qk"), values
    and output ("vo"), or all of them."""

    name: ClassVar[str] = "low_rank_projections"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    source: ClassVar[str] = "SVD-LLM (arXiv 2403.07378), section 3; CARE, equation 1"
    # Calibrates on the fast form; heads are no columns of a factor any more.
    after: ClassVar[tuple[str, ...]] = (
        "fuse_attention", "merge_kv_heads", "prune_heads", "shrink_head_dim", "compress_attention",
    )  # fmt: skip
    removes: ClassVar[tuple[Part, ...]] = ("q", "k", "v", "out")

    keep: float = choice(0.75, 0.5, 0.25, default=0.75)
    parts: str = choice("all", "qk", "vo", default="all")
    ranks: str = choice("uniform", "decay", default="uniform")

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """Factors for the projections of one site, or why not."""
        if self.parts not in _PARTS or self.ranks not in ("uniform", "decay"):
            return Miss(f"unknown parts `{self.parts}` or ranks `{self.ranks}`", target.node)
        if not 0 < self.keep < 1:
            return Miss(f"a share of {self.keep:g} makes nothing cheaper", target.node)
        if not notes.calibration:
            return Miss("which directions matter is not known without calibration data",
                        target.node, help="give --text FILE")  # fmt: skip
        found = _matrices(program, target, _PARTS[self.parts], self.keep)
        if isinstance(found, Miss):
            return found
        sums = moments(program, list(dict.fromkeys(m.source for m in found)), notes.calibration)
        spectra = [_Spectrum.of(m, sums[m.source]) for m in found]
        factors = [s.factors(rank) for s, rank in zip(spectra, self._ranks(spectra), strict=True)]

        def edit(copy: Program) -> None:
            _write(copy, factors)

        return Edit(
            graph=edit,
            sites=_write(program.copy(), factors),
            note=", ".join(f"{f.matrix.parts} to rank {f.rank} of {f.matrix.most}"
                           for f in factors),
            evidence=_evidence(program, notes, factors, sums),
        )  # fmt: skip

    def _ranks(self, spectra: Sequence[_Spectrum]) -> list[int]:
        """The rank of each projection; all keep the share of products together, by "uniform" each
        does."""
        uniform = [s.matrix.rank(self.keep) for s in spectra]
        if self.ranks == "uniform" or len(spectra) == 1:
            return uniform
        budget = sum(rank * s.matrix.sides for rank, s in zip(uniform, spectra, strict=True))
        gains = [
            (float(value) / s.total / s.matrix.sides, at)
            for at, s in enumerate(spectra)
            for value in s.values.flip(0)
        ]
        ranks = [1] * len(spectra)
        left = budget - sum(s.matrix.sides for s in spectra)
        first = [True] * len(spectra)
        for _, at in sorted(gains, reverse=True):
            sides = spectra[at].matrix.sides
            if first[at]:  # the rank of one that each has
                first[at] = False
            elif left >= sides and (ranks[at] + 1) * sides < spectra[at].matrix.products:
                ranks[at], left = ranks[at] + 1, left - sides
        return ranks


@dataclass(frozen=True)
class _Matrix:
    """One product with a matrix: node, the node it reads, its parameter, `weight`
    `[out, in]` float64, and which `parts` of the site it makes."""

    node: str
    source: str
    name: str
    layout: WeightLayout
    weight: Tensor
    parts: str

    @property
    def sides(self) -> int:
        """Multiply-adds per token and rank."""
        return sum(self.weight.shape)

    @property
    def products(self) -> int:
        """Multiply-adds per token as it is."""
        return self.weight.numel()

    @property
    def most(self) -> int:
        """The rank it may have."""
        return min(self.weight.shape)

    def rank(self, keep: float) -> int:
        """The rank at which this share of the products stays, or a little less."""
        rank = int(keep * self.products / self.sides)
        return max(1, rank if rank < 2 * _STEP else rank // _STEP * _STEP)


def _matrices(
    program: Program, site: Site, parts: Sequence[str], keep: float
) -> list[_Matrix] | Miss:
    """The products that make these parts of a site, each once."""
    made: dict[str, _Matrix] = {}
    reasons: list[str] = []
    for part in parts:
        path: Path | OutputPath | None = getattr(site, part)
        found = program.find(path.projection) if path is not None else None
        product = projection(found) if found is not None else None
        if path is None or product is None:
            why = site.missing.get(part, "an earlier rewrite took it away")
            reasons.append(f"the projection of {part} was not found: {why}")
            continue
        whole = program.weight(product.weight).detach().double()
        weight = whole if product.layout == "out_in" else whole.T
        makes = [p for p in _PARTS["all"] if _makes(site, p, product.node.name)]
        made[product.node.name] = _Matrix(
            product.node.name, product.source.name, product.weight, product.layout, weight,
            "".join(makes),
        )  # fmt: skip
    small = [m for m in made.values() if m.rank(keep) * m.sides >= m.products]
    if small:
        return Miss(f"a matrix of {tuple(small[0].weight.shape)} has no cheaper factors",
                    small[0].node)  # fmt: skip
    return list(made.values()) or Miss("; ".join(reasons), site.node)


@dataclass(frozen=True)
class _Spectrum:
    """The principal directions `[out, out]` of what a matrix gives, by ascending `values`."""

    matrix: _Matrix
    values: Tensor
    vectors: Tensor

    @staticmethod
    def of(matrix: _Matrix, sums: Gram) -> _Spectrum:
        """From the moments of the matrix's input with a constant column, which takes no part."""
        moment = matrix.weight @ sums.xx[:-1, :-1] @ matrix.weight.T
        values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
        return _Spectrum(matrix, values.clamp(min=0), vectors)

    @property
    def total(self) -> float:
        """The energy of all directions."""
        return max(float(self.values.sum()), 1e-300)

    def factors(self, rank: int) -> _Factors:
        """The best factors of a rank, and the relative error that they make."""
        top = self.vectors[:, -rank:]
        error = math.sqrt(float(self.values[:-rank].sum()) / self.total)
        return _Factors(self.matrix, top.T @ self.matrix.weight, top, error)


@dataclass(frozen=True)
class _Factors:
    """`down` `[rank, in]` and then `up` `[out, rank]` in the place of a matrix."""

    matrix: _Matrix
    down: Tensor
    up: Tensor
    predicted: float

    @property
    def rank(self) -> int:
        """The rank of the product."""
        return len(self.down)

    def error(self, sums: Gram, dtype: torch.dtype) -> float:
        """The relative error over the rows of the sums, with factors as they are written."""
        down, up = (x.to(dtype).double() for x in (self.down, self.up))
        xx, weight = sums.xx[:-1, :-1], self.matrix.weight
        wrong, right = (float(((w @ xx) * w).sum()) for w in (weight - up @ down, weight))
        return math.sqrt(max(0.0, wrong) / max(right, 1e-300))


def _write(program: Program, factors: Sequence[_Factors]) -> dict[str, Site]:
    """Put the factors into a program's graph; the new facts of all sites that read them."""
    sites = {site.id: site for site in program.sites}
    changed: dict[str, Site] = {}
    for made in factors:
        source, name = _replace(program, made)
        for site in [site for site in sites.values() if _touches(site, made)]:
            facts = _facts(site, made.matrix.node, source, name)
            sites[site.id] = changed[site.id] = facts
    program.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    for made in factors:
        program.drop_weight(made.matrix.name)
    return changed


def _replace(program: Program, made: _Factors) -> tuple[str, str]:
    """Let a product read the smaller rows; the name of their node, and of its new weight."""
    matrix = made.matrix
    node, source = program.node(matrix.node), program.node(matrix.source)
    dtype = program.weight(matrix.name).dtype
    taken = {name for name, _ in program.module.named_parameters(remove_duplicate=False)}
    base = f"{matrix.name}_down"
    name = next(f"{base}{i}" for i in range(len(taken) + 1) if f"{base}{i}" not in taken)
    weight = program.parameter(name, made.down.contiguous().to(dtype), before=node)
    down = program.call(aten.linear.default, (source, weight), before=node)
    node.replace_input_with(source, down)
    up = made.up if matrix.layout == "out_in" else made.up.T
    return down.name, rewired(program, node, matrix.name, up.contiguous().to(dtype))


def _touches(site: Site, made: _Factors) -> bool:
    return any(_makes(site, part, made.matrix.node) for part in _PARTS["all"])


def _makes(site: Site, part: str, node: str) -> bool:
    """Whether a product makes this part of a site."""
    path: Path | OutputPath | None = getattr(site, part)
    return path is not None and path.projection == node


def _facts(site: Site, node: str, source: str, name: str) -> Site:
    """A site's facts once a product of it has factors: what q, k and v read is the smaller rows,
    and no column of the output's last factor belongs to a head."""
    changed: dict[str, Any] = {}
    for part in ("q", "k", "v"):
        if _makes(site, part, node):
            changed[part] = replace(getattr(site, part), source=source, weight=name)
    if site.out is not None and _makes(site, "out", node):
        none = torch.empty(0, 0, dtype=torch.long)
        changed["out"] = replace(site.out, weight=name, channels=none)
    return replace(site, **changed)


def _evidence(
    program: Program, notes: Notes, factors: Sequence[_Factors], sums: dict[str, Gram]
) -> dict[str, float]:
    """Relative errors of each product: predicted, and measured on both kinds of data."""
    found: dict[str, float] = {}
    names = list(dict.fromkeys(f.matrix.source for f in factors))
    held = moments(program, names, notes.heldout)
    for made in factors:
        matrix = made.matrix
        dtype = program.weight(matrix.name).dtype
        found[f"{matrix.parts}_predicted"] = made.predicted
        found[f"{matrix.parts}_residual"] = made.error(sums[matrix.source], dtype)
        if held:
            found[f"{matrix.parts}_heldout"] = made.error(held[matrix.source], dtype)
    return found
