"""Run the attention on torch's fused `scaled_dot_product_attention` instead of the written-out
reference.

The fused kernel computes softmax(scale q k^T + mask) v in tiles, keeping a running maximum and sum
per query (Dao et al., FlashAttention, arXiv:2205.14135, section 3.1), so the score matrix never
lies in memory. It is the same function up to the order of sums. Half-precision inputs are
accumulated in float32 inside the kernel, so a spec that asks for a float32 softmax keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnopt.compiler.attend import runs_on_sdpa
from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass
from attnopt.compiler.program import Program
from attnopt.compiler.site import Site


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Set the backend "sdpa" where it computes the spec."""

    name: ClassVar[str] = "fuse_attention"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    source: ClassVar[str] = "Dao et al. 2022, FlashAttention, arXiv:2205.14135"
    after: ClassVar[tuple[str, ...]] = ("fold_repeated_kv", "simplify_mask")

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """Give the site's spec with the fused backend, or say why it stays as it is."""
        spec = program.spec(target)
        if spec.backend != "reference":
            return Miss(f"it already runs on the backend `{spec.backend}`", at=target.node)
        reason = runs_on_sdpa(spec)
        if reason:
            return Miss(reason, at=target.node)
        return Edit(spec=spec.with_(backend="sdpa"), note="runs on scaled_dot_product_attention")
