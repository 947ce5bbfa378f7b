"""An attention inside a latent: which widths its parts may have, what they lose, and the graph.

    c = linear(x, down)                       [batch, seq, rank]
    q, k, v = linear(c, up) + bias            [batch, heads, seq, fewer dims]

Heads are cut first, by the closed forms of `attnopt.compiler.head_dims`; the latent is that of the
cut heads (`latent.components`). Between the split into heads and the attention everything goes the
way that it went, cut to the dims that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from attnopt.compiler import latent
from attnopt.compiler.contract import Miss, Notes
from attnopt.compiler.gauge import freedom
from attnopt.compiler.grams import Gram, source_moments
from attnopt.compiler.head_costs import Results
from attnopt.compiler.head_dims import Keys, phase_mean
from attnopt.compiler.latent import Components
from attnopt.compiler.program import Program
from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.reproject import Which, projected
from attnopt.compiler.shared_heads import root
from attnopt.compiler.site import OutputPath, Path, Site
from attnopt.compiler.site_heads import WHICH, Heads, resize, results
from attnopt.compiler.smaller_heads import (
    Values,
    cut_rotary,
    cuts,
    fitted_keys,
    fitted_values,
    fixed_keys,
    logits_lost,
    rotary_pairs,
    value_basis,
)

_STEP = 8  # latents from twice this on are multiples of it


@dataclass(frozen=True)
class Widths:
    """Dims of queries and keys, of values, and of the latent; `work` and `cache` are the shares of
    the projections' products and of the cached numbers that are left."""

    qk: int
    v: int
    rank: int
    work: float
    cache: float


@dataclass(frozen=True)
class Known:
    """A site's projections, moments of what they read and of what heads give (on calibration data
    and, to `check`, on held-out data), why queries and keys (and values) keep their dims, and
    whether a decoder can hold the latent."""

    site: Site
    heads: Heads
    grams: Mapping[str, Gram]
    given: Results
    check: Results | None
    fixed_qk: Miss | None
    fixed_v: Miss | None
    absorbed: bool

    @staticmethod
    def read(program: Program, site: Site, notes: Notes) -> Known:
        """The site as it stands in the program."""
        heads, grams = Heads.read(program, site), source_moments(program, site, notes)
        given, check = results(program, site, notes, heads)
        assert grams is not None and given is not None
        free, qk, spec = freedom(program, site, "v"), fixed_keys(program, site), site.spec
        v = None if free.rest else Miss(f"values stay: {free.why}", site.node)
        plain = spec.softcap == 0.0 and "sinks" not in spec.extras
        absorbed = site.rotary is None and qk is None and v is None and plain
        absorbed = absorbed and site.mask == "causal"
        absorbed = absorbed and program.spec(site).mask.kind != "window"  # rings hold no latent
        return Known(site, heads, grams, given, check, qk, v, absorbed)

    @property
    def inputs(self) -> Tensor:
        """Second moments of what the projections read, a constant last."""
        return self.grams[cast(Path, self.site.q).source].xx

    def widths(self, keep: float, logits: float = 1.0) -> Widths | Miss:
        """The widths within the share that promise to lose least, where the logits' energy weighs
        `logits` times the outputs'."""
        if self.fixed_qk is not None and self.fixed_v is not None:
            return Miss(f"{self.fixed_qk.reason}; {self.fixed_v.reason}", self.site.node)
        tried = list(self.within(keep))
        if not tried:
            why = f"no smaller heads and latent leave {keep:g} of the products and of the cache"
            return Miss(why, self.site.node)
        parts = self.parts(self.heads, rotary_pairs(self.site))
        energies = latent.spectrum(parts, self.inputs, (logits, logits, 1.0))
        lost = [self._cut_lost(w, logits) + float(energies[: -w.rank].sum()) for w in tried]
        return tried[lost.index(min(lost))]

    def within(self, keep: float) -> Iterator[Widths]:
        """The widths that leave at most this share, from small heads to large."""
        dim, v_dim = self.heads.k.shape[1], self.heads.v.shape[1]
        step, v_step = _step(dim), _step(v_dim)
        for share in sorted({at / dim for at in range(step, dim + 1, step)}):
            qk = dim if self.fixed_qk is not None else _floor(share * dim, step)
            v = v_dim if self.fixed_v is not None else _floor(share * v_dim, v_step)
            found = self._widest(qk, v, keep) if v else None
            small = share <= keep or (self.absorbed and found is not None and found.cache <= keep)
            if found is not None and small and self._possible(qk):
                yield found

    def _widest(self, qk: int, v: int, keep: float) -> Widths | None:
        """The widest latent for heads of these dims, where there is one."""
        heads, groups = len(self.heads.q), len(self.heads.k)
        width, out = self.heads.q.shape[2] - 1, self.heads.out.shape[2]
        dim, v_dim = self.heads.k.shape[1], self.heads.v.shape[1]
        inside = (heads + groups) * qk + groups * v
        before = width * ((heads + groups) * dim + groups * v_dim) + heads * v_dim * out
        room = (keep * before - heads * v * out) / (width + inside)
        rank = int(min(room, keep * width, inside))
        rank = rank if rank < 2 * _STEP else rank // _STEP * _STEP
        if rank < 1:
            return None
        stored = groups * (qk + v)
        cached = min(rank, stored) if self.absorbed else stored
        work = (rank * (width + inside) + heads * v * out) / before
        return Widths(qk, v, rank, work, cached / (groups * (dim + v_dim)))

    def _possible(self, qk: int) -> bool:
        return isinstance(self.keys(qk), Keys | None)

    def keys(self, qk: int) -> Keys | Miss | None:
        """Queries and keys of these dims; None where they keep all."""
        if qk == self.heads.k.shape[1]:
            return None
        return fitted_keys(self.site, self.heads, self.grams, qk)

    def _cut_lost(self, widths: Widths, logits: float) -> float:
        """The shares of the logits' and of the results' energy that the smaller heads lose."""
        keys = self.keys(widths.qk)
        lost = logits * keys.tail if isinstance(keys, Keys) else 0.0
        if widths.v == self.heads.v.shape[1]:
            return lost
        return lost + value_basis(self.heads, self.given, widths.v).tail

    def parts(self, heads: Heads, pairs: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Queries, keys and values, each with the metric of its errors: what they do to logits,
        over all phases of rotary pairs, and to outputs."""
        gram = self.inputs
        met = phase_mean(heads.k @ gram @ heads.k.mT, pairs).repeat_interleave(heads.group, dim=0)
        asked = phase_mean(heads.queries(gram), pairs)
        return (heads.q, root(met)), (heads.k, root(asked)), (heads.v, root(heads.outputs()))


@dataclass(frozen=True)
class Compressed:
    """What becomes of a site: `small` are its heads cut, of what it reads; `new` of the latent."""

    known: Known
    widths: Widths
    keys: Keys | None
    values: Values | None
    small: Heads
    latent: Components

    @staticmethod
    def fit(program: Program, known: Known, widths: Widths, logits: float = 1.0) -> Compressed:
        """The cut heads and the latent of these widths, which must be possible."""
        site, small = known.site, known.heads
        keys, values = known.keys(widths.qk), None
        assert not isinstance(keys, Miss), keys
        if keys is not None:
            small = replace(small, q=keys.query(small.q), k=keys.key(small.k))
        if widths.v != small.v.shape[1]:
            given = known.given, known.check
            values = fitted_values(program, site, known.heads, *given, widths.v)
            small = replace(small, v=values.basis.down.mT @ small.v, out=values.out)
        parts = known.parts(small, left_pairs(site, keys))
        shares = logits, logits, 1.0
        made = latent.components(parts, known.inputs, widths.rank, shares)
        return Compressed(known, widths, keys, values, small, made)

    @property
    def new(self) -> Heads:
        """The projections that are written, of the latent."""
        q, k, v = (
            torch.cat((up, bias[..., None]), -1)
            for up, bias in zip(self.latent.up, self.latent.bias, strict=True)
        )
        return Heads(q, k, v, self.small.out)

    def write(self, program: Program) -> Site | Miss:
        """Put the latent and its heads into a program's graph; the site's new facts."""
        site = self.known.site
        order = {node: at for at, node in enumerate(program.graph.nodes)}
        paths: list[Path] = [getattr(site, which) for which in WHICH]
        first = min(paths, key=lambda path: order[program.node(path.split)])
        down = projected(program, first, self.latent.down, None, 1, "latent_down")
        if isinstance(down, Miss):
            return down
        try:
            kept = cuts(program, site, self._kept())
        except Unknown as reason:
            return Miss(f"what stands before the attention cannot be run: {reason}", site.node)
        q, k, v = (replace(path, source=down[0].name) for path in paths)
        bias = None if self.values is None else self.values.bias
        made = resize(program, replace(site, q=q, k=k, v=v), self.new, bias, cuts=kept)
        if isinstance(made, Miss):
            return made
        left = [path.projection for path in paths if program.has(path.projection)]
        if left:
            return Miss(
                "the product makes more than queries, keys and values, or is read twice", left[0]
            )
        if self.keys is None or site.rotary is None:
            return made
        return replace(made, rotary=cut_rotary(site.rotary, self.keys))

    def _kept(self) -> dict[Which, Tensor]:
        dims = torch.arange(self.widths.qk) if self.keys is None else self.keys.kept
        return {"q": dims, "k": dims, "v": torch.arange(self.widths.v)}

    def note(self) -> str:
        """What became smaller, and what did not and why."""
        spec, now = self.known.site.spec, self.widths
        stays = [
            miss.reason for miss in (self.known.fixed_qk, self.known.fixed_v) if miss is not None
        ]
        said = [
            f"a latent of {now.rank} of {self.latent.down.shape[1]}",
            f"heads {spec.head_dim} -> {now.qk} dims, values {spec.v_dim} -> {now.v}",
            f"{now.work:.0%} of the projections' products and {now.cache:.0%} of the cache left",
        ]
        return "; ".join([*said, *stays])

    def evidence(self, program: Program, notes: Notes) -> dict[str, float]:
        """The shares that are left, and the shares of energy that heads lose by their dims and by
        the latent: predicted, and seen with the weights as they are written."""
        site, known = self.known.site, self.known
        found = {"work": self.widths.work, "cache": self.widths.cache}
        if self.values is not None:
            found |= {"v_predicted": self.values.basis.tail, **self.values.lost}
        if self.keys is not None:
            found["qk_predicted"] = self.keys.tail
        for which, tail in zip(WHICH, self.latent.tails, strict=True):
            found[f"latent_{which}_predicted"] = tail
        dtype = program.weight(cast(OutputPath, site.out).weight).dtype
        down, *ups = (x.to(dtype).double() for x in (self.latent.down, *self.latent.up))
        parts = known.parts(self.small, left_pairs(site, self.keys))
        for said, heldout in (("residual", False), ("heldout", True)):
            grams = source_moments(program, site, notes, heldout)
            if grams is None:
                continue
            gram = grams[cast(Path, site.q).source].xx
            for which, up, (heads, metric) in zip(WHICH, ups, parts, strict=True):
                found[f"latent_{which}_{said}"] = latent.residual(heads, up, down, gram, metric)
            if self.keys is not None:
                found[f"qk_{said}"] = logits_lost(known.heads, self.small, self.keys, site, grams)
        return found


def left_pairs(site: Site, keys: Keys | None) -> Tensor:
    """The rotary pairs of heads with these queries and keys, `[pairs, 2]`; None: all dims."""
    if keys is None or site.rotary is None:
        return rotary_pairs(site)
    return cut_rotary(site.rotary, keys).pairs


def _step(dim: int) -> int:
    """Dims go in the largest step of 16, 8, 4 or 2 of which there are eight or more, else in twos
    or ones."""
    fine = next((s for s in (16, 8, 4, 2) if dim % s == 0 and dim >= 8 * s), 0)
    return fine or (1 if dim % 2 else 2)


def _floor(dims: float, step: int) -> int:
    return int(dims / step + 1e-9) * step
