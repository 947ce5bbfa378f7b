"""The whole attention inside a latent: what a layer reads is projected once, and queries, keys and
values are small heads of that.

    c = P x,    q_h = A_h c,  k_g = B_g c,  v_g = D_g c,    y = sum_h W_h (softmax(q_h k_g) v_g)

Compressed attention (CCA, Figliolia et al. 2025, section 3) trains such a layer; here it is made of
a trained one. First heads lose dims in closed form (`attnopt.compiler.head_dims`), keys and values
to the share `keep`; scores, cache and output projection shrink with them. Then P are the principal
directions of all that is left of q, k and v at once, where an error of a query weighs by the keys
that it meets, one of a key by its queries, and one of a value by the output projection
(`latent.components`); how much logits weigh against outputs is tried on held-out data. P is paid
for once, so that for the same products it is wider than three factors of their own. It has at most
`keep` of the width and leaves at most `keep` of the products.

Where a decoder can hold c itself (causal, without rotary), that is its cache, and heads may stay
wider than `keep` for a narrower P; of what fits both shares, the widths that promise to lose least
are taken. Run `refit` afterwards.

The paper's convolution over the sequence of queries and keys starts as the identity here, and is
worth its cost once trained (`attnopt.compiler.convolved`): `conv` gives its length in tokens, in
plans that heal afterwards. A decoder then keeps the last `conv - 1` queries and keys besides, and
holds keys and values, not c, so that without rotary the widths may be others than without `conv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from attnopt.compiler.compressed import Compressed, Known
from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, choice, option
from attnopt.compiler.convolved import convolve, no_past
from attnopt.compiler.damage import Damage
from attnopt.compiler.program import Program
from attnopt.compiler.removal import edited
from attnopt.compiler.site import Site
from attnopt.compiler.site_heads import WHICH, unknown
from attnopt.compiler.site_weights import token_rows

# How much the logits' energy weighs against the outputs' where the latent is found. Near-uniform
# attention hardly sees its logits, a sharp one does: held-out data decides.
_LOGITS = (1.0, 0.1, 0.01)


@dataclass(frozen=True)
class CompressAttention(Pass):
    """Leave at most the share `keep` of the projections' products, and of the cache where queries,
    keys and values can all be cut."""

    name: ClassVar[str] = "compress_attention"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    source: ClassVar[str] = (
        "CCA (Figliolia et al. 2025, arXiv 2510.04476), section 3, not from scratch"
    )
    # Calibrates on the fast form; what heads are left is made of one latent.
    after: ClassVar[tuple[str, ...]] = (
        "fuse_attention", "merge_kv_heads", "prune_heads", "shrink_head_dim",
    )  # fmt: skip

    keep: float = choice(0.75, 0.5, 0.33, 0.25, default=0.5)
    conv: int = option(0, 2, 4, default=0)

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """A latent and smaller heads for one site, or why not."""
        miss = self._refused(target, program, notes)
        if miss is not None:
            return miss
        known = Known.read(program, target, notes)
        if self.conv:
            known = replace(known, absorbed=False)  # keys are not made of one token's latent
        options: dict[str, Compressed] = {}
        for logits in _LOGITS if notes.heldout else _LOGITS[:1]:
            widths = known.widths(self.keep, logits)
            if isinstance(widths, Miss):
                return widths
            option = Compressed.fit(program, known, widths, logits)
            facts = self._write(option, program.copy())
            if isinstance(facts, Miss):
                return facts
            options[f"logits_{logits:g}"] = option
        damage = _damage(program, notes, options)
        made = options[min(options, key=lambda name: damage.get(f"damage_{name}", 0.0))]
        chosen = self._write(made, program.copy())
        assert isinstance(chosen, Site), chosen

        def edit(copy: Program) -> None:
            self._write(made, copy)

        said = f"; queries and keys through convolutions of {self.conv} tokens" if self.conv else ""
        return Edit(graph=edit, sites={target.id: chosen}, note=made.note() + said,
                    evidence={**made.evidence(program, notes), **damage})  # fmt: skip

    def _write(self, made: Compressed, program: Program) -> Site | Miss:
        site = made.write(program)
        if isinstance(site, Miss) or not self.conv:
            return site
        return convolve(program, site, self.conv)

    def _refused(self, site: Site, program: Program, notes: Notes) -> Miss | None:
        if not 0 < self.keep < 1:
            return Miss(f"keep={self.keep} is no share between 0 and 1", site.node)
        miss = self._unconvolved(site, program, notes)
        miss = miss if miss is not None else unknown(program, site)
        if miss is not None:
            return miss
        for which in WHICH:
            if not program.has(getattr(site, which).source):
                return Miss(f"an earlier rewrite took away what {which} is made of", site.node)
        if len({token_rows(program, getattr(site, which)) for which in WHICH}) > 1:
            return Miss("queries, keys and values are not made of one input", site.node)
        if not notes.calibration:
            return Miss("the principal directions are not known without calibration data",
                        site.node, help="give --text FILE")  # fmt: skip
        return None

    def _unconvolved(self, site: Site, program: Program, notes: Notes) -> Miss | None:
        """Why the convolutions that are asked for are not made."""
        if not self.conv:
            return None
        if self.conv < 2:
            return Miss(f"conv={self.conv} reads no earlier token", site.node, help="use conv=2")
        if not notes.healed:
            return Miss("convolutions over queries and keys start as the identity: without "
                        "training they cost time and gain nothing", site.node,
                        help="add a step `heal{}` to the plan, or use conv=0")  # fmt: skip
        return no_past(program, site)


def _damage(program: Program, notes: Notes, options: Mapping[str, Compressed]) -> dict[str, float]:
    """What each option loses on held-out data; empty where there is none."""
    if len(options) < 2:
        return {}
    damage = Damage(notes.original, notes.heldout)

    found = {}
    for name, made in options.items():

        def edit(copy: Program, made: Compressed = made) -> None:
            made.write(copy)

        found[f"damage_{name}"] = damage(edited(program, edit))
    return found
