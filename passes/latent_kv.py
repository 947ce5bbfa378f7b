"""Latent keys and values: what is cached of a token is one vector that all heads make theirs of.

Keys and values become linear maps of a latent c of `rank` numbers and, under rotary, a part of
`rotary` numbers that all heads share and that keeps its rotary (multi-head latent attention,
DeepSeek-V2, section 2.1; conversion after TransMLA, Meng et al. 2025). Prompts run expanded; a
derived decoder stores c and the shared part alone, and absorbs the maps into queries and outputs.

Without rotary nothing but the rank is lost: at the model's width it is exact. With rotary, what is
not shared loses its rotary, and that costs; below half of the bytes it is experimental until it is
healed. The maths is in `attnopt.compiler.latent`; run `refit` afterwards. Keys that keep their own
rotary per head at a lower rank, with values absorbed, are `shrink_head_dim`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from attnopt.compiler import latent
from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, choice, option
from attnopt.compiler.gauge import Freedom, freedom
from attnopt.compiler.grams import source_moments
from attnopt.compiler.latent import Latent, Slots
from attnopt.compiler.latent_graph import install
from attnopt.compiler.program import Program
from attnopt.compiler.regions import Part
from attnopt.compiler.shared_heads import root
from attnopt.compiler.site import Path, Site
from attnopt.compiler.site_heads import Heads, unknown

_EXACT = 1e-12  # a share of energy lost that is rounding
_UNHEALED = "experimental unless healed: below half of the bytes, rotary models lose much"


@dataclass(frozen=True)
class LatentKv(Pass):
    """Store `keep` of the cache's bytes, of which `rotary` is the shared rotary part.

    `method`: how the slots that keep their rotary are found: "complex" (any unitary map among
    heads), "real" (orthogonal ones, TransMLA's) or "average" (from the weights alone, as X-EcoMLA;
    needs no data). `fold` neighbouring frequencies are taken for one. `even` keeps one slot of
    every so many neighbouring frequencies instead of the strongest, so that all layers have the
    frequencies of a rotary embedding with fewer dims, as checkpoints of models with latents do;
    `fold` is then what the number of slots makes it.
    """

    name: ClassVar[str] = "latent_kv"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    source: ClassVar[str] = "DeepSeek-V2 (2024); TransMLA (Meng et al. 2025); complex slots"

    after: ClassVar[tuple[str, ...]] = ("fuse_attention",)
    # A whole sequence runs expanded, with wider keys: what shrinks is the cache.
    removes: ClassVar[tuple[Part, ...]] = ()

    keep: float = choice(0.5, 0.33, 0.25, 0.17, 0.125, default=0.5)
    rotary: float = choice(0.125, 0.25, 0.5, 0.75, default=0.5)
    fold: int = choice(1, 2, 4, default=1)
    method: str = choice("complex", "real", "average", default="complex")
    even: bool = option(False, True, default=False)

    @classmethod
    def caching(cls, program: Program, share: float) -> tuple[Pass, ...]:
        """A latent of this share, with more and with less of it rotary where there is rotary; of
        whole numbers, and no more at any site."""
        sizes = {site.kv_heads * (site.spec.head_dim + site.spec.v_dim) for site in program.sites}
        keep = min((math.floor(share * size + 1e-9) / size for size in sizes), default=0.0)
        if not 0 < keep < 1:
            return ()
        turned = any(site.rotary is not None for site in program.sites)
        return tuple(
            cls(keep=keep, rotary=part) for part in (0.5, 0.25, 0.75)[: 3 if turned else 1]
        )

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """The maps for one site, or why not."""
        miss = self._refused(target, program, notes)
        if miss is not None:
            return miss
        known = _Known.read(program, target, notes, self.method != "average")
        sizes = self._sizes(known)
        if isinstance(sizes, str):
            return Miss(sizes, target.node)
        slots = self._slots(known, sizes[0])
        rest = latent.without(known.heads.k, known.pairs, slots)
        made = latent.joint(rest, known.heads.v, known.inputs, *known.metrics, sizes[1])
        trial = install(program.copy(), target, known.heads, slots, made)
        if isinstance(trial, Miss):
            return trial

        def edit(copy: Program) -> None:
            install(copy, target, known.heads, slots, made)

        return Edit(
            graph=edit, sites={target.id: trial}, note=_note(known, slots, made),
            evidence=self._evidence(program, target, notes, known, rest, slots, made),
        )  # fmt: skip

    def _refused(self, site: Site, program: Program, notes: Notes) -> Miss | None:
        if not (0 < self.keep < 1 and 0 <= self.rotary <= 1 and self.fold > 0):
            return Miss("keep is a share below 1, rotary a share, and fold a count", site.node)
        missing = unknown(program, site)
        if missing is not None:
            return missing
        if "rotary" in site.missing:
            return Miss(
                f"the rotary embedding is not understood: {site.missing['rotary']}", site.node
            )
        if cast(Path, site.k).source != cast(Path, site.v).source:
            return Miss("keys and values are made of two inputs", cast(Path, site.v).source)
        if site.spec.mask.kind == "window":
            return Miss("the cache of a window is short already", site.node)
        free = freedom(program, site, "q") & freedom(program, site, "k")
        paired = site.rotary is None or free.pairs == "scale"
        for said in (free, freedom(program, site, "v")):
            if not said.rest or not paired:
                return Miss(f"keys and values are no linear maps: {_why(said)}", site.node)
        if self.method != "average" and not notes.calibration:
            return Miss(
                "the principal directions need calibration data", site.node,
                help="give --text FILE, or use latent_kv{method=average}",
            )  # fmt: skip
        return None

    def _sizes(self, known: _Known) -> tuple[int, int] | str:
        """How many slots keep their rotary, and the latent's rank; or why it is no smaller."""
        kept = round(known.numbers * self.keep)
        copies = 1 if self.method == "average" else len(known.heads.k)
        count = min(round(kept * self.rotary / 2), len(known.pairs) * copies)
        if self.even and count:
            count = max(n for n in range(1, count + 1) if len(known.pairs) % n == 0)
        rank = min(kept - 2 * count, known.heads.k.shape[2] - 1)
        if rank < 1 or rank + 2 * count >= known.numbers:
            stored = f"{max(rank, 0)} numbers and {2 * count} with rotary"
            return f"{stored} would be stored of {known.numbers}"
        return count, rank

    def _slots(self, known: _Known, count: int) -> Slots:
        heads, even = known.heads, self.even and count > 0
        fold = len(known.pairs) // count if even else self.fold
        if self.method == "average" or known.queries is None:
            first = known.frequencies.argsort()[fold - 1 :: fold] if even else None
            return latent.average(heads.k, known.pairs, count, first)
        return latent.slots(
            heads.k, known.inputs, known.queries, known.pairs, known.frequencies, count,
            fold, real=self.method == "real", even=even,
        )  # fmt: skip

    def _evidence(
        self, program: Program, site: Site, notes: Notes, known: _Known, rest: Tensor,
        slots: Slots, made: Latent,
    ) -> dict[str, float]:  # fmt: skip
        """Shares of energy lost about the mean, predicted and measured on both kinds of data, and
        the share of the keys' rotary energy that keeps its rotary."""
        found: dict[str, float] = {}
        if self.method != "average":
            found |= {"k_predicted": made.k_tail, "v_predicted": made.v_tail}
        if len(known.pairs):
            found["rotary_kept"] = slots.energy
        path = cast(Path, site.k)
        dtype = program.weight(path.weight).dtype
        down, up_k, up_v = (x.to(dtype).double() for x in (made.down, made.up_k, made.up_v))
        k_metric, v_metric = known.metrics
        for said, heldout in (("residual", False), ("heldout", True)):
            grams = source_moments(program, site, notes, heldout)
            if grams is None:
                continue
            gram = grams[path.source].xx
            found[f"k_{said}"] = latent.residual(rest, up_k, down, gram, k_metric)
            found[f"v_{said}"] = latent.residual(known.heads.v, up_v, down, gram, v_metric)
        return found


@dataclass(frozen=True)
class _Known:
    """What the maps are made of: projections, rotary pairs `[pairs, 2]` and frequencies, second
    moments of what keys and values are made of, and of the queries that read them (None without
    data, and then all errors weigh alike)."""

    heads: Heads
    pairs: Tensor
    frequencies: Tensor
    inputs: Tensor
    queries: Tensor | None

    @staticmethod
    def read(program: Program, site: Site, notes: Notes, with_data: bool) -> _Known:
        """The site as it stands in the program."""
        heads, rotary = Heads.read(program, site), site.rotary
        pairs = torch.empty(0, 2).long() if rotary is None else rotary.pairs
        frequencies = torch.empty(0) if rotary is None else rotary.frequencies
        grams = source_moments(program, site, notes) if with_data else None
        if grams is None:
            alike = torch.eye(heads.k.shape[2], dtype=torch.float64)
            return _Known(heads, pairs, frequencies, alike, None)
        q, k = (grams[cast(Path, path).source].xx for path in (site.q, site.k))
        return _Known(heads, pairs, frequencies, k, heads.queries(q))

    @property
    def numbers(self) -> int:
        """How many numbers keys and values of a token are."""
        return len(self.heads.k) * (self.heads.k.shape[1] + self.heads.v.shape[1])

    @property
    def metrics(self) -> tuple[Tensor, Tensor]:
        """How errors of keys weigh in the logits, and those of values in the output."""
        if self.queries is not None:
            return root(self.queries), root(self.heads.outputs())
        k, v = (torch.eye(x.shape[1], dtype=torch.float64).expand(len(x), -1, -1)
                for x in (self.heads.k, self.heads.v))  # fmt: skip
        return k, v


def _note(known: _Known, slots: Slots, made: Latent) -> str:
    rank, rotary = len(made.down), 2 * len(slots.pair)
    said = f"{known.numbers} -> {rank + rotary} numbers cached per token"
    if len(known.pairs):
        shared = f"{rotary} of them with rotary ({slots.energy:.1%} of its energy)"
        told = f"{said}, {shared if rotary else 'none of them with rotary'}"
        small = round((rank + rotary) / known.numbers, 2) < 0.5
        return f"{told}; {_UNHEALED}" if small else told
    return f"{said}{', exact' if max(made.k_tail, made.v_tail) < _EXACT else ''}"


def _why(said: Freedom) -> str:
    return said.why or "something between the projection and the attention forbids it"
