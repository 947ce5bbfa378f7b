"""Latent keys and values: what is cached of a token is one vector that all heads make theirs of.

Keys and values become linear maps of a latent c of `rank` numbers and, under rotary, a part of
`rotary` numbers that all heads share and that keeps its rotary (multi-head latent attention,
DeepSeek-V2, section 2.1; conversion after TransMLA, Meng et al. 2025). Prompts run expanded; a
derived decoder stores c and the shared part alone, and absorbs the maps into queries and outputs.

Without rotary nothing but the rank is lost: at the model's width it is exact. With rotary, what is
not shared loses its rotary, and that costs; below half of the bytes it needs healing. The maths is
in `attnopt.compiler.latent`; run `refit` afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from attnopt.compiler import latent
from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, choice
from attnopt.compiler.gauge import Freedom, freedom
from attnopt.compiler.grams import Gram, input_moments, moments
from attnopt.compiler.latent import Latent, Slots
from attnopt.compiler.latent_graph import Heads, install
from attnopt.compiler.program import Program
from attnopt.compiler.regions import Part
from attnopt.compiler.shared_heads import root
from attnopt.compiler.site import Path, Site

_EXACT = 1e-12  # a share of energy lost that is rounding


@dataclass(frozen=True)
class LatentKv(Pass):
    """Store `keep` of the cache's bytes, of which `rotary` is the shared rotary part.

    `method`: how the slots that keep their rotary are found: "complex" (any unitary map among
    heads), "real" (orthogonal ones, TransMLA's) or "average" (from the weights alone, as X-EcoMLA;
    needs no data). `fold` neighbouring frequencies are taken for one.
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

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """The maps for one site, or why not."""
        miss = self._refused(target, program, notes)
        if miss is not None:
            return miss
        heads = Heads.read(program, target)
        gram = _gram(program, target, notes)
        sizes = self._sizes(heads)
        if isinstance(sizes, str):
            return Miss(sizes, target.node)
        maps = self._maps(heads, gram, *sizes)
        trial = install(program.copy(), target, heads, *maps)
        if isinstance(trial, Miss):
            return trial

        def edit(copy: Program) -> None:
            install(copy, target, heads, *maps)

        held = _gram(program, target, notes, heldout=True)
        return Edit(
            graph=edit, sites={target.id: trial}, note=self._note(heads, *maps),
            evidence=self._evidence(program, target, heads, *maps, gram, held),
        )  # fmt: skip

    def _refused(self, site: Site, program: Program, notes: Notes) -> Miss | None:
        for which in ("q", "k", "v", "out"):
            if getattr(site, which) is None:
                why = site.missing.get(which, "not known")
                return Miss(f"the projection of {which} was not found: {why}", site.node)
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

    def _sizes(self, heads: Heads) -> tuple[int, int] | str:
        """How many slots keep their rotary, and the latent's rank; or why it is no smaller."""
        whole = len(heads.k) * (heads.k.shape[1] + heads.v.shape[1])
        kept = round(whole * self.keep)
        copies = 1 if self.method == "average" else len(heads.k)
        count = min(round(kept * self.rotary / 2), len(heads.pairs) * copies)
        most = heads.k.shape[2] - 1
        rank = min(kept - 2 * count, most)
        if rank < 1 or rank + 2 * count >= whole:
            return f"{rank} numbers and {2 * count} with rotary would be stored of {whole}"
        return count, rank

    def _maps(
        self, heads: Heads, gram: Tensor | None, count: int, rank: int
    ) -> tuple[Slots, Latent]:
        if self.method == "average" or gram is None:
            gram = None
            slots = latent.average(heads.k, heads.pairs, count)
        else:
            slots = latent.slots(
                heads.k, gram, heads.queries(gram), heads.pairs, heads.frequencies, count,
                self.fold, real=self.method == "real",
            )  # fmt: skip
        rest = latent.without(heads.k, heads.pairs, slots)
        inputs = torch.eye(heads.k.shape[2], dtype=torch.float64) if gram is None else gram
        return slots, latent.joint(rest, heads.v, inputs, *_metrics(heads, gram), rank)

    def _evidence(
        self, program: Program, site: Site, heads: Heads, slots: Slots, made: Latent,
        gram: Tensor | None, held: Tensor | None,
    ) -> dict[str, float]:  # fmt: skip
        """Shares of energy lost about the mean, predicted and measured on both kinds of data, and
        the share of the keys' rotary energy that keeps its rotary."""
        dtype = program.weight(cast(Path, site.k).weight).dtype
        found: dict[str, float] = {}
        if self.method != "average":
            found |= {"k_predicted": made.k_tail, "v_predicted": made.v_tail}
        if len(heads.pairs):
            found["rotary_kept"] = slots.energy
        down = made.down.to(dtype).double()
        rest = latent.without(heads.k, heads.pairs, slots)
        for said, moment in (("residual", gram), ("heldout", held)):
            if moment is None:
                continue
            k_metric, v_metric = _metrics(heads, gram)
            for name, whole, up, metric in (
                ("k", rest, made.up_k, k_metric), ("v", heads.v, made.up_v, v_metric)
            ):  # fmt: skip
                rounded = up.to(dtype).double()
                found[f"{name}_{said}"] = latent.residual(whole, rounded, down, moment, metric)
        return found

    def _note(self, heads: Heads, slots: Slots, made: Latent) -> str:
        whole = len(heads.k) * (heads.k.shape[1] + heads.v.shape[1])
        rank, rotary = len(made.down), 2 * len(slots.pair)
        said = f"{whole} -> {rank + rotary} numbers cached per token"
        if rotary:
            return f"{said}, {rotary} of them with rotary ({slots.energy:.1%} of its energy)"
        return f"{said}{', exact' if max(made.k_tail, made.v_tail) < _EXACT else ''}"


def _why(said: Freedom) -> str:
    return said.why or "something between the projection and the attention forbids it"


def _metrics(heads: Heads, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """How errors of keys weigh in the logits and those of values in the output; alike without
    data."""
    if gram is None:
        alike = [torch.eye(x.shape[1], dtype=torch.float64) for x in (heads.k, heads.v)]
        return alike[0].expand(len(heads.k), -1, -1), alike[1].expand(len(heads.v), -1, -1)
    return root(heads.queries(gram)), root(heads.read_by(heads.out @ heads.out.transpose(1, 2)))


def _gram(program: Program, site: Site, notes: Notes, heldout: bool = False) -> Tensor | None:
    """Second moments of what keys and values are made of; None without data."""
    batches = notes.heldout if heldout else notes.calibration
    if not batches:
        return None
    name = cast(Path, site.k).source
    grams: dict[str, Gram] = (
        input_moments(notes, [name], heldout)
        if notes.original.has(name)
        else moments(program, [name], batches)
    )
    return grams[name].xx
