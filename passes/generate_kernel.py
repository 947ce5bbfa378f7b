"""Run the attention by the implementation that is best for its mask and sizes on a GPU: a kernel
generated in Triton, torch's fused kernels, or FlexAttention.

The generated kernel is FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithm 1) with the mask,
the soft cap and the extra tensors of the spec computed tile by tile, so that none of them becomes a
mask tensor and tiles that no query reads are left out. Which implementation runs is decided on the
device, per bucket of sizes (`attnopt.codegen.dispatch`); the function is the same up to the order
of sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass
from attnopt.compiler.program import Program
from attnopt.compiler.site import Site


@dataclass(frozen=True)
class GenerateKernel(Pass):
    """Set the backend "triton"."""

    name: ClassVar[str] = "generate_kernel"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    source: ClassVar[str] = "Dao 2023, FlashAttention-2, arXiv:2307.08691"
    after: ClassVar[tuple[str, ...]] = (
        "fold_repeated_kv", "simplify_mask", "toeplitz_bias", "fuse_attention", "merge_kv_heads",
        "prune_heads", "shrink_head_dim", "sliding_window", "share_kv_layers", "refit", "heal",
    )  # fmt: skip

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """Give the site's spec with the dispatched backend, or say why it stays as it is."""
        if notes.target == "cpu":
            return Miss("the target is `cpu`, for which Triton generates no code")
        if find_spec("triton") is None:
            return Miss("triton is not installed", help="pip install 'attnopt[gpu]'")
        spec = program.spec(target)
        if spec.backend == "triton":
            return Miss("it already runs on the backend `triton`", at=target.node)
        return Edit(spec=spec.with_(backend="triton"), note=f"dispatched on {notes.target}")
