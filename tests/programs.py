"""Programs small enough to read, for tests of single passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.site import Site
from attnopt.compiler.spec import AttentionSpec

EXACT = ("simplify_mask", "fold_repeated_kv", "fuse_attention")


class _Attention(nn.Module):
    """One call of the canonical op."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.line = spec.text

    def forward(self, q: Tensor, k: Tensor, v: Tensor, extras: list[Tensor]) -> Tensor:
        made: Tensor = ATTENTION(q, k, v, extras, self.line)
        return made


def one_attention(
    spec: AttentionSpec, batch: int = 2, seq: int = 7, extras: Sequence[Tensor] = ()
) -> Program:
    """A traced program that is a single attention, with its one site; float64 random inputs.

    The site has no projections, so a pass that needs them must miss it, and say so.
    """
    q = torch.randn(batch, spec.heads, seq, spec.head_dim, dtype=torch.float64)
    k = torch.randn(batch, spec.kv_heads, seq, spec.head_dim, dtype=torch.float64)
    v = torch.randn(batch, spec.kv_heads, seq, spec.v_dim, dtype=torch.float64)
    inputs = (q, k, v, list(extras))
    module = torch.export.export(_Attention(spec), inputs, strict=False).module()
    assert isinstance(module, torch.fx.GraphModule)
    program = Program(module, Batch(inputs), name="one attention")
    (node,) = program.attentions()
    site = Site("s0", node.name, "", "", spec, spec.kv_heads, mask=spec.mask.kind)
    return program.with_sites([site])


def rewritten(program: Program) -> Program:
    """A raised program with the exact rewrites that need no data."""
    for name in EXACT:
        program, _ = apply_pass(program, read_pass(name), ("*",), Notes(program), verify=False)
    return program
