"""Merge key/value heads: multi-head or grouped attention to fewer key/value heads, down to one.

Key/value heads form groups of `factor`, adjacent ones or those that are most alike (QCQA, Joshi et
al. 2024, searches for groupings). "mean" averages their projections (Ainslie et al. 2023, "GQA",
section 2.1). "closed" takes the optimum that the gauge of each part allows, computed from second
moments of the projections' inputs: one complex rank-1 fit per rotary frequency for the keys,
weighted by the query's energy; weighted principal components for keys without rotary and for
values. The maps back to the old heads are absorbed in the query and output projections, so nothing
is added at run time. The maths is in `attnopt.compiler.shared_heads`; a temperature per head can
mend the sharpness that is lost; run `refit` afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from attnopt.compiler import shared_heads, temperature
from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, choice, option
from attnopt.compiler.diagnostics import kv_similarity
from attnopt.compiler.gauge import Freedom, freedom
from attnopt.compiler.grams import Gram, source_moments
from attnopt.compiler.head_groups import fixed_order, groups_of
from attnopt.compiler.program import Program
from attnopt.compiler.regions import Part
from attnopt.compiler.reproject import reproject
from attnopt.compiler.shared_heads import Shared
from attnopt.compiler.site import Path, Site
from attnopt.compiler.site_heads import WHICH, Heads, usual_kv_heads
from attnopt.compiler.site_weights import write_output, write_query


@dataclass(frozen=True)
class MergeKvHeads(Pass):
    """Share each key/value head among `factor` times as many query heads; 0 leaves one key/value
    head (multi-query attention)."""

    name: ClassVar[str] = "merge_kv_heads"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    source: ClassVar[str] = (
        "Ainslie et al. 2023 (mean); complex rank-1 keys, group-PCA values (closed)"
    )

    after: ClassVar[tuple[str, ...]] = ("fuse_attention",)  # calibrates on the fast form
    removes: ClassVar[tuple[Part, ...]] = ("k", "v", "core", "between")

    factor: int = choice(2, 4, 8, default=2)
    method: str = choice("closed", "mean", default="closed")
    grouping: str = option("adjacent", "similar", default="adjacent")
    temperature: bool = option(False, True, default=False)

    @classmethod
    def caching(cls, program: Program, share: float) -> tuple[Pass, ...]:
        """The smallest groups that are small enough, of the heads that most sites have."""
        heads = usual_kv_heads(program)
        factor = next((n for n in range(2, heads + 1) if not heads % n and share * n >= 1), 0)
        if not factor:
            return ()
        closed = cls(factor=factor)
        return closed, replace(closed, grouping="similar"), replace(closed, method="mean")

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """New projections for one site, or why not."""
        miss = self._refused(target, notes)
        if miss is not None:
            return miss
        groups = target.kv_heads // (self.factor or target.kv_heads)
        heads = _Heads(**vars(Heads.read(program, target)))
        grams = source_moments(program, target, notes)
        order = torch.arange(target.kv_heads)
        if self.grouping == "similar":
            order = groups_of(heads.similarity(grams or {}, target), groups)
            miss = fixed_order(program, target, heads.of_queries(order), order)
            if miss is not None:
                return miss
        heads = heads.ordered(order)
        free = _freedom(program, target) if self.method == "closed" else None
        k, v = heads.merged(groups, grams, target, free)
        made = program.copy()
        trial = _apply(made, target, heads, k, v)
        if isinstance(trial, Miss):
            return trial
        evidence = _evidence(program, target, notes, heads, k, v, grams)
        if self.temperature:
            sharper = _sharper(program, made, trial, notes, heads.of_queries(order))
            heads = replace(heads, q=heads.q * sharper.factors[:, None, None])
            evidence |= {"kl_before": sharper.before, "kl_after": sharper.after}

        def edit(copy: Program) -> None:
            _apply(copy, target, heads, k, v)

        return Edit(
            graph=edit,
            sites={target.id: trial},
            note=self._note(target, free),
            evidence=evidence,
        )

    def _refused(self, site: Site, notes: Notes) -> Miss | None:
        for which in (*WHICH, "out"):
            if getattr(site, which) is None:
                why = site.missing.get(which, "not known")
                return Miss(f"the projection of {which} was not found: {why}", site.node)
        if site.out is not None and not site.out.channels.numel():
            return Miss("the output projection has factors", site.out.projection)
        if "rotary" in site.missing:
            return Miss(
                f"the rotary embedding is not understood: {site.missing['rotary']}", site.node
            )
        if site.kv_heads == 1:
            return Miss("there is one key/value head already", site.node)
        if self.factor < 0 or self.factor == 1:
            return Miss(f"groups of {self.factor} merge nothing", site.node)
        if self.factor and site.kv_heads % self.factor:
            return Miss(
                f"{site.kv_heads} key/value heads do not form groups of {self.factor}", site.node
            )
        fitted = self.grouping == "similar" or self.temperature
        if (self.method == "closed" or fitted) and not notes.calibration:
            form = "closed form" if self.method == "closed" else "choice of groups and temperatures"
            return Miss(
                f"the {form} needs calibration data",
                site.node,
                help="give --text FILE, or use merge_kv_heads{method=mean}",
            )
        if self.temperature and site.qk_norm:
            return Miss("a norm of queries takes a temperature away again", site.node)
        return None

    def _note(self, site: Site, free: _Free | None) -> str:
        left = site.kv_heads // (self.factor or site.kv_heads)
        said = f"{site.kv_heads} -> {left} key/value heads, {self.method}"
        return f"{said}; {free.limits}" if free is not None and free.limits else said


@dataclass(frozen=True)
class _Free:
    """The gauge of keys (common to q and k) and of values."""

    k: Freedom
    v: Freedom
    rotary: bool

    @property
    def limits(self) -> str:
        """What of the closed form the gauge forbids, in words."""
        said = []
        if self.rotary and self.k.pairs == "turn":
            said.append("keys aligned in phase, then averaged")
        elif (self.rotary and self.k.pairs == "none") or not self.k.rest:
            said.append("keys averaged")
        if not self.v.rest:
            said.append("values averaged")
        why = self.k.why or self.v.why
        return ", ".join(said) + (f" ({why})" if said and why else "")


def _freedom(program: Program, site: Site) -> _Free:
    k = freedom(program, site, "q") & freedom(program, site, "k")
    return _Free(k, freedom(program, site, "v"), site.rotary is not None)


@dataclass(frozen=True)
class _Heads(Heads):
    """A site's projections, and what they become."""

    def similarity(self, grams: dict[str, Gram], site: Site) -> Tensor:
        """How alike key/value heads are, `[kv_heads, kv_heads]`: mean of keys' and values'."""
        pairs = site.rotary.pairs if site.rotary is not None else torch.empty(0, 2).long()
        c_q, c_k, c_v = (grams[cast(Path, getattr(site, w)).source].xx for w in WHICH)
        keys, values = self.k.flatten(0, 1), self.v.flatten(0, 1)
        query = self.queries(c_q)
        metric = shared_heads.root(self.outputs())
        of_k = kv_similarity.of_keys(keys @ c_k @ keys.T, len(self.k), query, pairs)
        return (of_k + kv_similarity.of_values(values @ c_v @ values.T, len(self.v), metric)) / 2

    def ordered(self, order: Tensor) -> _Heads:
        """The same heads in another order of the key/value heads."""
        queries = self.of_queries(order)
        return _Heads(self.q[queries], self.k[order], self.v[order], self.out[queries])

    def merged(
        self, groups: int, grams: dict[str, Gram] | None, site: Site, free: _Free | None
    ) -> tuple[Shared, Shared]:
        """The shared keys and values. Without a gauge (`free` None) both are means."""
        pairs = site.rotary.pairs if site.rotary is not None else torch.empty(0, 2).long()
        metric = shared_heads.root(self.outputs())
        if grams is None:
            one = torch.eye(self.k.shape[1], dtype=torch.float64).expand(len(self.k), -1, -1)
            return shared_heads.mean(self.k, groups, one), shared_heads.mean(self.v, groups, metric)
        c_q, c_k, c_v = (grams[cast(Path, getattr(site, w)).source].xx for w in WHICH)
        query = self.queries(c_q)
        bound = free or _Free(
            Freedom("none", False), Freedom("none", False), site.rotary is not None
        )
        k = shared_heads.keys(self.k, c_k, groups, query, pairs, bound.k)
        if bound.v.rest:
            return k, shared_heads.principal(self.v, c_v, groups, metric)
        return k, shared_heads.mean(self.v, groups, metric)

    def query(self, k: Shared) -> Tensor:
        """The query projection with the keys' maps absorbed, `[heads, dim, width + 1]`."""
        return k.expand.repeat_interleave(self.group, dim=0).transpose(1, 2) @ self.q

    def output(self, v: Shared) -> Tensor:
        """The output projection with the values' maps absorbed, `[heads, v_dim, width]`."""
        return v.expand.repeat_interleave(self.group, dim=0).transpose(1, 2) @ self.out


@dataclass(frozen=True)
class _Sharper:
    """Factors on queries `[heads]`, and the divergence of attention weights (nats per query and
    head, held-out) without and with them."""

    factors: Tensor
    before: float
    after: float


def _sharper(program: Program, made: Program, site: Site, notes: Notes, order: Tensor) -> _Sharper:
    made.module.recompile()
    usual = temperature.GRID.index(1.0)
    fit, check = (
        temperature.divergences(program, made, site.node, order, batches)
        for batches in (notes.calibration, notes.heldout or notes.calibration)
    )
    best = fit.argmin(0)
    heads = torch.arange(len(best))
    best = torch.where(check[best, heads] < check[usual], best, usual)
    factors = torch.tensor(temperature.GRID, dtype=torch.float64)[best]
    return _Sharper(factors, float(check[usual].mean()), float(check[best, heads].mean()))


def _apply(program: Program, site: Site, heads: _Heads, k: Shared, v: Shared) -> Site | Miss:
    """Put the shared projections into a program's graph.

    Answers the site with its new facts, or what stood in the way.
    """
    old = [cast(Path, getattr(site, which)) for which in WHICH]
    q_path, k_path, v_path = old
    made = _reprojected(program, site, "k", k.weight, k_path)
    if not isinstance(made, Miss):
        made = _reprojected(program, made, "v", v.weight, v_path)
    if isinstance(made, Miss):
        return made
    query = heads.query(k)
    if q_path.projection in (k_path.projection, v_path.projection):
        made = _reprojected(program, made, "q", query, q_path)
        if isinstance(made, Miss):
            return made
    else:
        made = write_query(program, made, query[..., :-1], query[..., -1] if q_path.bias else None)
    made = write_output(program, made, heads.output(v))
    program.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    for name in {name for path in old for name in (path.weight, path.bias) if name}:
        program.drop_weight(name)
    return made


def _reprojected(
    program: Program, site: Site, which: Literal["q", "k", "v"], weight: Tensor, path: Path
) -> Site | Miss:
    """Reproject with `[heads, dim, width + 1]`."""
    count, dim, _ = weight.shape
    flat = weight.reshape(count * dim, -1)
    bias = flat[:, -1] if path.bias else None
    return reproject(program, site, which, flat[:, :-1], bias, count)


def _evidence(
    program: Program,
    site: Site,
    notes: Notes,
    heads: _Heads,
    k: Shared,
    v: Shared,
    grams: dict[str, Gram] | None,
) -> dict[str, float]:
    """Shares of key and value energy lost: predicted, and measured on both kinds of data."""
    dtype = program.weight(cast(Path, site.k).weight).dtype
    found: dict[str, float] = {}
    held = source_moments(program, site, notes, heldout=True)
    for name, shared, old, path in (("k", k, heads.k, site.k), ("v", v, heads.v, site.v)):
        rounded = replace(shared, weight=shared.weight.to(dtype).double())
        source = cast(Path, path).source
        if shared.tail is not None:
            found[f"{name}_predicted"] = shared.tail
        if grams is not None:
            found[f"{name}_residual"] = rounded.residual(old, grams[source].xx)
        if held is not None:
            found[f"{name}_heldout"] = rounded.residual(old, held[source].xx)
    return found
