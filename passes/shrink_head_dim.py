"""Heads of fewer dims: queries and keys, values and output, each in the basis that loses least.

Values: what a head gives is cut to its principal directions as the output projection weighs them;
both maps are absorbed, so this is open to every model. Queries and keys without rotary: the best
approximation of the logits (KQ-SVD), absorbed in both projections. With rotary only whole pairs can
go, and dims in no pair follow the same closed form; a norm of each head (Qwen 3) forbids both, as
it would be of other numbers. The maths is in `attnopt.compiler.head_dims`, how rotary tables follow
in `attnopt.compiler.cut_dims`. The softmax scale stays what it was.

The share that stays is rounded to steps of 16, 8, 4 or 2 dims, whichever leaves four steps or more:
kernels work in such steps. The cache becomes smaller as the heads do. Afterwards the output
projection is fitted by a ridge that is chosen on held-out data; run `refit` as well. Sources:
output-weighted principal components; Eckart and Young 1936 on the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, choice
from attnopt.compiler.cut_dims import DimCut
from attnopt.compiler.gauge import freedom
from attnopt.compiler.grams import source_moments
from attnopt.compiler.head_dims import Keys
from attnopt.compiler.program import Program
from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.reproject import Which
from attnopt.compiler.site import Path, Site
from attnopt.compiler.site_heads import WHICH, Heads, resize, results, unknown
from attnopt.compiler.smaller_heads import (
    Values,
    cut_rotary,
    cuts,
    fitted_keys,
    fitted_values,
    fixed_keys,
    logits_lost,
)


@dataclass(frozen=True)
class ShrinkHeadDim(Pass):
    """Keep this share of the dims of each head, in queries and keys ("qk"), values ("v") or both,
    as far as the model allows."""

    name: ClassVar[str] = "shrink_head_dim"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    source: ClassVar[str] = "Eckart and Young 1936, on logits and on weighted outputs of heads"
    # Calibrates on the fast form; heads that are merged or go need no smaller basis.
    after: ClassVar[tuple[str, ...]] = ("fuse_attention", "merge_kv_heads", "prune_heads")

    keep: float = choice(0.75, 0.5, 0.25, default=0.75)
    parts: str = choice("both", "v", "qk", default="both")

    @classmethod
    def caching(cls, program: Program, share: float) -> tuple[Pass, ...]:
        """As many steps of dims as fit, of heads as most sites have."""
        dims = [site.spec.head_dim for site in program.sites]
        dim = max(dims, key=dims.count, default=1)
        count = math.floor(share * dim / _step(dim) + 1e-9)
        keep = count * _step(dim) / dim
        return (cls(keep=keep),) if 0 < keep < 1 else ()

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """Smaller projections for one site, or why not."""
        if not 0 < self.keep < 1:
            return Miss(f"keep={self.keep} is no share between 0 and 1", target.node)
        miss = unknown(program, target)
        if miss is not None:
            return miss
        if not notes.calibration:
            return Miss("which dims matter is not known without calibration data", target.node,
                        help="give --text FILE")  # fmt: skip
        if self.parts not in ("both", "v", "qk"):
            return Miss(f"unknown parts `{self.parts}`", target.node)
        heads = Heads.read(program, target)
        keys = self._keys(program, target, notes, heads) if self.parts != "v" else None
        basis = self._values(program, target, notes, heads) if self.parts != "qk" else None
        reasons = [part for part in (keys, basis) if isinstance(part, Miss)]
        change = _Change(
            heads, keys if isinstance(keys, Keys) else None,
            basis if isinstance(basis, Values) else None,
        )  # fmt: skip
        if change.keys is None and change.values is None:
            return reasons[0]
        facts = change.write(program.copy(), target)
        if isinstance(facts, Miss) and change.keys is not None and change.values is not None:
            reasons.append(facts)  # a rotary that cannot be cut leaves the values
            change = replace(change, keys=None)
            facts = change.write(program.copy(), target)
        if isinstance(facts, Miss):
            return facts

        def edit(copy: Program) -> None:
            change.write(copy, target)

        return Edit(graph=edit, sites={target.id: facts}, note=change.note(target, reasons),
                    evidence=change.evidence(program, target, notes))  # fmt: skip

    def _keys(self, program: Program, site: Site, notes: Notes, heads: Heads) -> Keys | Miss:
        miss = fixed_keys(program, site)
        if miss is not None:
            return miss
        dim = heads.k.shape[1]
        dims = _less(dim, self.keep)
        if dims == dim:
            return Miss(f"queries and keys stay: {dim} dims do not come in steps", site.node)
        grams = source_moments(program, site, notes)
        assert grams is not None
        return fitted_keys(site, heads, grams, dims)

    def _values(self, program: Program, site: Site, notes: Notes, heads: Heads) -> Values | Miss:
        dim = heads.v.shape[1]
        dims = _less(dim, self.keep)
        free = freedom(program, site, "v")
        if not free.rest:
            return Miss(f"values stay: {free.why}", site.node)
        if dims == dim:
            return Miss(f"values stay: {dim} dims do not come in steps", site.node)
        train, check = results(program, site, notes, heads)
        assert train is not None
        return fitted_values(program, site, heads, train, check, dims)


@dataclass(frozen=True)
class _Change:
    """What becomes of a site's heads; None for a part that stays."""

    heads: Heads
    keys: Keys | None
    values: Values | None

    @property
    def new(self) -> Heads:
        """The projections that are written."""
        made = self.heads
        if self.keys is not None:
            made = replace(made, q=self.keys.query(made.q), k=self.keys.key(made.k))
        if self.values is not None:
            made = replace(made, v=self.values.basis.down.mT @ made.v, out=self.values.out)
        return made

    def write(self, program: Program, site: Site) -> Site | Miss:
        """Put the smaller heads into a program's graph; the site's new facts."""
        try:
            cuts = self._cuts(program, site)
        except Unknown as reason:
            return Miss(f"what stands before the attention cannot be run: {reason}", site.node)
        bias = None if self.values is None else self.values.bias
        made = resize(program, site, self.new, bias, cuts=cuts)
        if isinstance(made, Miss) or self.keys is None or site.rotary is None:
            return made
        return replace(made, rotary=cut_rotary(site.rotary, self.keys))

    def _cuts(self, program: Program, site: Site) -> dict[Which, DimCut]:
        """How each operand is cut that is made anew: those that change, and those that come from
        the same product."""
        kept: dict[Which, Tensor] = {}
        if self.keys is not None:
            kept["q"] = kept["k"] = self.keys.kept
        if self.values is not None:
            kept["v"] = torch.arange(self.values.out.shape[1])
        paths = {which: cast(Path, getattr(site, which)) for which in WHICH}
        touched = {paths[which].projection for which in kept}
        for which in WHICH:
            if paths[which].projection in touched and which not in kept:
                kept[which] = torch.arange(paths[which].channels.shape[1])
        return cuts(program, site, kept)

    def note(self, site: Site, reasons: Sequence[Miss]) -> str:
        """What became smaller, and what did not and why."""
        said, new = [], self.new
        if self.keys is not None:
            form = "KQ-SVD" if site.rotary is None else f"{len(self.keys.pairs)} rotary pairs"
            said.append(f"queries and keys {site.spec.head_dim} -> {new.k.shape[1]} dims ({form})")
        if self.values is not None:
            said.append(f"values {site.spec.v_dim} -> {new.v.shape[1]} dims")
        return "; ".join([*said, *(miss.reason for miss in reasons)])

    def evidence(self, program: Program, site: Site, notes: Notes) -> dict[str, float]:
        """Shares of the logits' and of the results' energy that are lost: told, and seen with the
        weights as they are written."""
        found: dict[str, float] = {}
        if self.values is not None:
            found["v_predicted"] = self.values.basis.tail
            found |= self.values.lost
        if self.keys is None:
            return found
        found["qk_predicted"] = self.keys.tail
        for name, heldout in (("qk_residual", False), ("qk_heldout", True)):
            grams = source_moments(program, site, notes, heldout)
            if grams is not None:
                found[name] = logits_lost(self.heads, self.new, self.keys, site, grams)
        return found


def _less(dim: int, keep: float) -> int:
    """How many dims stay: in the largest step of 16, 8, 4 or 2 of which there are four or more."""
    step = _step(dim)
    return max(1, int(keep * dim / step + 0.5)) * step


def _step(dim: int) -> int:
    return next((s for s in (16, 8, 4, 2) if dim % s == 0 and dim >= 4 * s), dim)
