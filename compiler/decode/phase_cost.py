"""What attention costs in the two phases of decoding: a prompt read at once (prefill), and a step
of one token.

Of a kernel that writes no score to memory: products with the keys and values that the mask keeps,
and every query, key, value and output read or written once. With H query heads, G key/value heads,
n keys read and elements of b bytes, a step of one sequence takes

    FLOPs = 2 H n (head_dim + v_dim)
    bytes = b (G n + H) (head_dim + v_dim)

and one with a latent of width r and a rotary key of width d_rope that all heads share (multi-head
latent attention, DeepSeek-V2, arXiv:2405.04434, section 2.1; absorbed form, appendix C)

    FLOPs = 2 H n (2 r + d_rope)
    bytes = b (n (r + d_rope) + H (2 r + d_rope)),

since keys and values are the same n vectors. Projections are not part of it, nor are the products
that expand a latent or absorb its expansion: their weights are read in either phase.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import fx

from attnopt.compiler import text
from attnopt.compiler.decode import latents
from attnopt.compiler.decode.split import Split, split
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Program, attribute
from attnopt.compiler.raising.evaluate import example_input
from attnopt.compiler.site import Site
from attnopt.compiler.spec import CAUSAL, AttentionSpec, Mask


@dataclass(frozen=True)
class Load:
    """How many sequences there are, the tokens of each prompt, and how many a step finds cached."""

    batch: int = 1
    prompt: int = 512
    cached: int = 512


@dataclass(frozen=True)
class Latent:
    """An attention whose keys and values are products of one latent of width `rank` per token and,
    for the rotated dims, one key of width `rope_dim` that all heads share.

    A prompt is read in the expanded form, with keys of `head_dim + rope_dim` and values of `v_dim`
    per head, a step in the absorbed one.
    """

    heads: int
    head_dim: int
    v_dim: int
    rank: int
    rope_dim: int = 0
    mask: Mask = CAUSAL


@dataclass(frozen=True)
class Phase:
    """Operations and bytes of one phase; `intensity` is their ratio, in FLOP per byte."""

    derived: ClassVar[tuple[str, ...]] = ("intensity",)
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: Phase) -> Phase:
        return Phase(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class SitePhases:
    """One attention: reading a prompt, one step, and the bytes of cache that a token of one
    sequence takes where it is kept; `cache_bytes` are those of one sequence that a step reads."""

    site: str
    prefill: Phase
    step: Phase
    cache_bytes_per_token: int
    cache_bytes: int


@dataclass(frozen=True)
class Decoding:
    """What decoding with a causal language model costs, estimated from shapes.

    `sites` are its attentions without projections. `weight_bytes` are the weights that a step reads
    once, tables of which it looks up rows left out, and `cache_bytes` what it reads of the caches
    of all sequences.
    """

    derived: ClassVar[tuple[str, ...]] = ("cache_bytes_per_token", "cache_share", "ceiling")
    batch: int
    prompt: int
    cached: int
    sites: tuple[SitePhases, ...]
    weight_bytes: int
    cache_bytes: int
    kind: Literal["estimated"] = "estimated"

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of cache that a token of one sequence takes."""
        return sum(site.cache_bytes_per_token for site in self.sites)

    @property
    def cache_share(self) -> float:
        """The share of the caches in the bytes that a step reads (0 to 1)."""
        total = self.cache_bytes + self.weight_bytes
        return self.cache_bytes / total if total else 0.0

    @property
    def ceiling(self) -> float:
        """How many times as fast a step that waits for memory alone is without its caches."""
        return 1 / (1 - self.cache_share) if self.cache_share < 1 else float("inf")

    @property
    def prefill(self) -> Phase:
        """All attentions together, on the prompt."""
        return sum((site.prefill for site in self.sites), Phase(0.0, 0.0))

    @property
    def step(self) -> Phase:
        """All attentions together, in a step."""
        return sum((site.step for site in self.sites), Phase(0.0, 0.0))


def phases(
    spec: AttentionSpec | Latent, load: Load, itemsize: int = 4, site: str = ""
) -> SitePhases:
    """The phases of an attention whose elements take `itemsize` bytes; see the module's text."""
    if isinstance(spec, Latent):
        whole = spec.head_dim + spec.rope_dim + spec.v_dim  # of one head, on a prompt
        single = 2 * spec.rank + spec.rope_dim  # of one head, in a step
        cached = spec.rank + spec.rope_dim
        made = spec.heads * whole + cached
    else:
        whole = single = spec.head_dim + spec.v_dim
        cached = made = spec.kv_heads * whole
    flops = 2.0 * load.batch * spec.heads
    moved = float(load.batch * itemsize)
    keys = spec.mask.reads(load.cached + 1)
    return SitePhases(
        site,
        Phase(
            flops * whole * spec.mask.pairs(load.prompt, load.prompt),
            moved * load.prompt * (spec.heads * whole + made),
        ),
        Phase(flops * single * keys, moved * (keys * cached + spec.heads * single)),
        itemsize * cached,
        itemsize * cached * spec.mask.reads(load.cached),
    )


def decoding(program: Program, load: Load | None = None) -> Decoding:
    """What decoding costs with a raised causal language model; without a load, prompts like the
    example's and a step after one.

    Weights may be real, fake or on the meta device. Raises `Problem` A701 to A703 where it is no
    such model.
    """
    parts = split(program)
    load = load or _load(program, parts.tokens[0])
    sites = list[SitePhases]()
    kept = set[object]()
    for site in program.sites:
        if not program.has(site.node):
            continue
        made, read = _site(program, parts, site, load), program.node(site.node).args[1:3]
        # Attentions that read the same keys and values keep them once.
        sites.append(replace(made, cache_bytes_per_token=0) if read in kept else made)
        kept.add(read)
    return Decoding(
        load.batch, load.prompt, load.cached, tuple(sites), _weight_bytes(program),
        load.batch * sum(site.cache_bytes for site in sites),
    )  # fmt: skip


def decoding_or_why(program: Program, load: Load | None = None) -> Decoding | str:
    """As `decoding`, with the reason in words where there is none."""
    try:
        return decoding(program, load)
    except Problem as problem:
        return ": ".join(filter(None, (problem.what, problem.why)))


def _load(program: Program, tokens: str) -> Load:
    batch, length = map(int, example_input(program, program.node(tokens)).shape[:2])
    return Load(batch, length, length)


def _site(program: Program, parts: Split, site: Site, load: Load) -> SitePhases:
    mask = mask_of(program, site)
    if mask is None or mask.kind == "full" or not mask.causal:
        raise Problem(
            "A703", f"{site.module or site.id} is not known to read earlier tokens alone",
            where=site.source, why=f"its mask is {site.mask}",
        )  # fmt: skip
    node, spec = program.node(site.node), program.spec(site)
    own: AttentionSpec | Latent = spec.with_(
        kv_heads=min(spec.kv_heads, site.kv_heads),
        mask=mask,  # the spec may see heads repeated
    )
    found = latents.find(program, parts, node)
    if found is not None:
        rotary = found.widths[0][1] - found.rank
        own = Latent(spec.heads, spec.head_dim - rotary, spec.v_dim, found.rank, rotary, mask)
    keys = cast(fx.Node, node.args[1])
    return phases(own, load, keys.meta["val"].dtype.itemsize, site.id)


def mask_of(program: Program, site: Site) -> Mask | None:
    """The class of a site's mask, also where the spec leaves it to a tensor; None without one."""
    held = program.spec(site).mask
    named = site.mask.partition("+")[0]
    if held.kind != "full" or named == "full":
        return held
    if not named.startswith(("causal", "window")):
        return None
    call = text.parse(named)
    return text.build(Mask, {"kind": call.name, **call.values}, "mask")


def _weight_bytes(program: Program) -> int:
    """Bytes of the parameters that a step reads: all but tables that rows are looked up of."""
    found: dict[int, int] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        value = attribute(program.module, str(node.target))
        looked_up = all(user.target is torch.ops.aten.embedding.default for user in node.users)
        if isinstance(value, torch.nn.Parameter) and not looked_up:
            found[value.untyped_storage()._cdata] = value.numel() * value.element_size()
    return sum(found.values())
