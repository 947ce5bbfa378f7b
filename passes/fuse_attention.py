"""Run the attention on torch's fused `scaled_dot_product_attention` instead of the written-out
reference.

The fused kernel computes softmax(scale q k^T + mask) v in tiles, keeping a running maximum and sum
per query (Dao et al., FlashAttention, arXiv:2205.14135, section 3.1), so the score matrix never
lies in memory. It is the same function up to the order of sums. Half-precision inputs are
accumulated in float32 inside the kernel, so a spec that asks for a float32 softmax keeps it. A
causal attention whose bias is one number per key (ALiBi) gets it as one more column of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from torch import fx

from attnopt.compiler.attend import runs_on_sdpa
from attnopt.compiler.attend_column import takes
from attnopt.compiler.bounds import moderate
from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass
from attnopt.compiler.program import Program
from attnopt.compiler.site import Site
from attnopt.compiler.spec import AttentionSpec


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Set the backend "sdpa", or "column" where that computes the spec."""

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
        if _bias_is_a_column(program, program.node(target.node), spec):
            note = "runs on scaled_dot_product_attention, its bias as a column of the keys"
            return Edit(spec=spec.with_(backend="column"), note=note)
        return Edit(spec=spec.with_(backend="sdpa"), note="runs on scaled_dot_product_attention")


def _bias_is_a_column(program: Program, attention: fx.Node, spec: AttentionSpec) -> bool:
    """Whether the bias is one moderate number per key: with a mask among its numbers, a query that
    reads no key would give something else."""
    if spec.extras != ("bias",):
        return False
    (bias,) = cast(list[fx.Node], attention.args[3])
    q = cast(fx.Node, attention.args[0]).meta["val"]
    return takes(spec, q, bias.meta["val"]) and moderate(program, bias)
