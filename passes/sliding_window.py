"""Read a window of recent keys and a few sink keys instead of all (StreamingLLM, 2023).

Query i keeps key j where i - j < left or j < sink; under a causal mask never j > i, for an encoder
|i - j| < left. The sink keys take up the weight that a softmax has no use for; without them the
outputs of long texts go astray. Positions stay as they are.

`groups` names the key/value heads to window, `kept` picks them instead: those whose kept attention
mass on calibration data is at least that share on average. The others go on reading everything, in
an attention of their own.

Dropping the mass delta of a query's keys and renormalising moves its output by at most 2 delta
max|v|, so the kept mass that is reported bounds the error at each site. Run `refit` afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from attnopt.compiler import attend, text
from attnopt.compiler.attend_window import pays
from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, choice
from attnopt.compiler.grams import real
from attnopt.compiler.layout import same_size
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising.evaluate import concrete, example_sizes
from attnopt.compiler.regions import Part
from attnopt.compiler.site import Site
from attnopt.compiler.spec import AttentionSpec, Mask, parse_spec
from attnopt.compiler.split_heads import split_heads


@dataclass(frozen=True)
class SlidingWindow(Pass):
    """Keep `left` recent keys (the query's own included) and the first `sink`."""

    name: ClassVar[str] = "sliding_window"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    source: ClassVar[str] = (
        "StreamingLLM (Xiao et al. 2023); heads by kept mass after DuoAttention (2024)"
    )
    # Heads with windows of their own have no projections of their own any more.
    after: ClassVar[tuple[str, ...]] = (
        "simplify_mask", "fuse_attention", "shrink_head_dim", "compress_attention",
    )  # fmt: skip
    removes: ClassVar[tuple[Part, ...]] = ("core", "between")

    left: int = choice(64, 128, 256, 512, 1024, 2048, 4096, default=256)
    sink: int = choice(0, 4, 16, default=4)
    kept: float = choice(0.0, 0.9, 0.95, 0.99, default=0.0)
    groups: tuple[int, ...] = ()
    backend: str = "auto"

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """The window on one site, or on some of its heads, or why not."""
        spec = program.spec(target)
        mask = self._mask(target, spec, program)
        if isinstance(mask, Miss):
            return mask
        if self.backend not in ("auto", "chunked", "sdpa", "reference"):
            return Miss(f"unknown backend `{self.backend}`", target.node)
        longest = _longest(target, program, notes)
        if longest <= mask.left:
            return Miss(f"no input is longer than {longest}: the window holds it all", target.node)
        windowed = spec.with_(mask=mask, backend=self._backend(spec, mask, longest))
        # All the data where heads are chosen by it, one batch where it is only told.
        data = notes.calibration if self.kept else notes.calibration[:1]
        mass = _kept_mass(target, program, notes, mask, data) if data else None
        chosen = self._chosen(target, mass)
        if isinstance(chosen, Miss):
            return chosen
        said = f"{len(chosen)} of {target.kv_heads} key/value heads read {text.dump_value(mask)}"
        evidence = {} if mass is None else {"kept_mass": float(mass[chosen].mean())}
        if len(chosen) == target.kv_heads:
            return Edit(spec=windowed, note=said, evidence=evidence)
        return _split(target, program, chosen, windowed, said, evidence)

    def _mask(self, site: Site, spec: AttentionSpec, program: Program) -> Mask | Miss:
        q, k = (cast(fx.Node, arg).meta["val"] for arg in program.node(site.node).args[:2])
        if not same_size(q.shape[2], k.shape[2]):
            return Miss("queries and keys are not the same sequence", site.node)
        if site.position == "unknown":
            return Miss("the position encoding is not understood", site.node)
        present = _class(site, spec)
        if present is None:
            return Miss(
                f"the mask is `{site.mask}`, which is no class that a window could narrow",
                site.node,
                help=site.missing.get("mask", ""),
            )
        if present.kind != "window":
            causal = present.kind == "causal"
            return Mask("window", left=self.left, sink=self.sink, causal=causal)
        narrow = replace(present, left=self.left, sink=min(self.sink, present.sink))
        if self.left >= present.left:
            return Miss(f"the model's own window is {present.left} keys already", site.node)
        return narrow

    def _backend(self, spec: AttentionSpec, mask: Mask, longest: int) -> str:
        if self.backend != "auto":
            return self.backend
        dense = "reference" if attend.runs_on_sdpa(spec) else "sdpa"
        return "chunked" if pays(spec.with_(mask=mask), longest) else dense

    def _chosen(self, site: Site, mass: Tensor | None) -> list[int] | Miss:
        everyone = list(range(site.kv_heads))
        if self.groups:
            outside = [g for g in self.groups if g not in everyone]
            if outside:
                return Miss(
                    f"there are {site.kv_heads} key/value heads, none is {outside}", site.node
                )
            return sorted(set(self.groups))
        if not self.kept:
            return everyone
        if mass is None:
            return Miss("choosing heads by kept mass needs calibration data", site.node)
        found = [g for g in everyone if float(mass[g]) >= self.kept]
        if found:
            return found
        best = float(mass.max())
        return Miss(
            f"no head keeps {self.kept:.2f} of its mass; the best keeps {best:.3f}", site.node
        )


def _class(site: Site, spec: AttentionSpec) -> Mask | None:
    """The mask class in force.

    What the site is known to compute, or the spec's own where the spec says more.
    """
    if spec.mask.kind != "full":
        return spec.mask
    first = site.mask.split("+")[0]
    if first in ("full", "padding", "relative-bias", "alibi"):
        return spec.mask
    if first == "causal":
        return Mask("causal")
    if first.startswith("window"):
        call = text.parse(first)
        return text.build(Mask, {"kind": "window", **call.values}, "mask")
    return None


def _split(
    site: Site,
    program: Program,
    chosen: Sequence[int],
    windowed: AttentionSpec,
    said: str,
    evidence: dict[str, float],
) -> Edit | Miss:
    made = split_heads(program.copy(), site, chosen, windowed)
    if isinstance(made, Miss):
        return made

    def edit(copy: Program) -> None:
        split_heads(copy, site, chosen, windowed)

    return Edit(graph=edit, sites={site.id: made}, note=said, evidence=evidence)


def _longest(site: Site, program: Program, notes: Notes) -> int:
    """The longest sequence that this attention meets in the example or in the data."""
    size = cast(fx.Node, program.node(site.node).args[0]).meta["val"].shape[2]
    batches = [program.example, *notes.calibration, *notes.heldout]
    return max(concrete(size, example_sizes(replace(program, example=batch))) for batch in batches)


def _kept_mass(
    site: Site, program: Program, notes: Notes, mask: Mask, batches: Sequence[Batch]
) -> Tensor:
    """The mean share of attention weight that each key/value head's queries keep, `[kv_heads]`
    float64.
    """
    node = program.node(site.node)
    spec = parse_spec(str(node.args[4]))
    extras = [cast(fx.Node, extra).name for extra in cast(Sequence[Any], node.args[3])]
    names = [cast(fx.Node, arg).name for arg in node.args[:2]]
    total, count = torch.zeros(site.kv_heads, dtype=torch.float64), 0
    for values, batch in notes.record(program, [*names, *extras], batches):
        q, k = (values[name] for name in names)
        weights = attend.weights(q, k, [values[name] for name in extras], spec)
        keep = mask.dense(q.shape[2], k.shape[2])
        share = (weights.double() * keep).sum(-1)
        valid = real(program, names[0], batch, axes=(0, 2))
        if valid is None:
            valid = torch.ones(share.shape[0], share.shape[2], dtype=torch.bool)
        share = share * valid[:, None, :]
        total += share.reshape(share.shape[0], site.kv_heads, -1).sum((0, 2))
        count += int(valid.sum()) * spec.heads // site.kv_heads
    return total / max(1, count)
