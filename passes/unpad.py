"""Unpad: an encoder's token-wise part runs on the real tokens, attention within each sequence.

A padded batch `[B, S, width]` with lengths n_1 .. n_B holds N = sum n_b real tokens, and the
products, norms and activations of a transformer treat every token on its own, so they cost
N / (B S) as much on the packed tokens `[N, width]`. Attention drops padded keys anyway: within a
sequence its cost falls from S^2 to n_b^2. Sequences of one length run as one batched call. Tokens
are packed as early as the graph allows (mostly their ids) and unpacked where the model needs the
padded shape.

Exact: every value at a real token, and every result that the model computes from real tokens, is
the padded program's up to the order of sums. At padded positions, outputs of the shape of the input
hold 0 instead of values that mean nothing. A node that may read padded positions otherwise is a
reason not to unpad.

Source: effective transformers (ByteDance 2020); Zhai et al., ByteTransformer, IPDPS 2023,
section III.D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, Scope
from attnopt.compiler.layout import Extent, is_symbol, same_size
from attnopt.compiler.pack_graph import placeholder_dim, rewrite
from attnopt.compiler.packed_ops import PACKED_ATTENTION
from attnopt.compiler.packing import Region, choose
from attnopt.compiler.program import Program
from attnopt.compiler.spec import parse_spec
from attnopt.compiler.tokenwise import analyse

_PRODUCTS = ("linear", "addmm", "matmul", "mm")


@dataclass(frozen=True)
class Unpad(Pass):
    """Run on real tokens only.

    Needs the padding mask as a fact of the attention, as `simplify_mask` finds it.
    """

    name: ClassVar[str] = "unpad"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    scope: ClassVar[Scope] = "program"
    valid_only: ClassVar[bool] = True
    source: ClassVar[str] = "Zhai et al., ByteTransformer, IPDPS 2023"
    after: ClassVar[tuple[str, ...]] = (
        "simplify_mask", "fold_repeated_kv", "fuse_attention", "merge_kv_heads", "latent_kv",
        "share_kv_layers",
        "prune_heads", "shrink_head_dim", "compress_attention", "low_rank_projections",
        "sliding_window",
        "skip_sublayers", "refit", "heal",
    )  # fmt: skip

    def rewrite(self, target: Any, program: Program, notes: Notes) -> Edit | Miss:
        if any(node.target is PACKED_ATTENTION for node in program.graph.nodes):
            return Miss("the program already runs on packed tokens")
        attentions = program.attentions()
        if not attentions:
            return Miss("the program has no raised attention")
        padded = [node for node in attentions if "padding" in parse_spec(str(node.args[4])).extras]
        if not padded:
            return Miss(
                "no attention has a padding mask: every position counts as real",
                at=attentions[0].name,
                help="run simplify_mask first, and give inputs with an attention mask",
            )
        region = _region(program, padded[0])
        if isinstance(region, Miss):
            return region
        return Edit(graph=_edit(region), note=_note(region), evidence=_evidence(region, program))


def _region(program: Program, attention: fx.Node) -> Region | Miss:
    """The part to pack, by the shapes and the padding mask of one attention."""
    q: Any = attention.args[0]
    shape = q.meta["val"].shape
    extent = Extent(shape[0], shape[2])
    extras = parse_spec(str(attention.args[4])).extras
    padding: Any = attention.args[3][extras.index("padding")]  # type: ignore[index]
    if same_size(extent.batch, 1):
        return Miss(
            "the batch size is fixed at 1 in this trace",
            help="give example inputs with a batch of 2 or more",
        )
    for what, size in (("batch size", extent.batch), ("length", extent.seq)):
        if is_symbol(size) and placeholder_dim(program.graph, size) is None:
            return Miss(
                f"the {what} {size} of attention `{attention.name}` is that of no input",
                at=attention.name,
            )
    found = analyse(program.graph, extent, padding, _equal())
    return choose(program, found)


def _edit(region: Region) -> Callable[[Program], None]:
    def edit(copy: Program) -> None:
        rewrite(copy, region)
        packed = {n.name: n for n in copy.graph.nodes if n.target is PACKED_ATTENTION}
        gone = dict.fromkeys(("q", "k", "v", "out"), "the program runs on packed tokens")
        copy.sites = tuple(
            replace(
                s, spec=parse_spec(str(packed[s.node].args[4])), q=None, k=None, v=None, out=None,
                missing={**s.missing, **gone},
            ) if s.node in packed else s
            for s in copy.sites
        )  # fmt: skip
        copy.sublayers = ()

    return edit


def _note(region: Region) -> str:
    kept = f"; positions {list(region.columns)} are always computed" if region.columns else ""
    return (
        f"{len(region.nodes)} operators run on real tokens only, "
        f"attention within each sequence{kept}; "
        "padded positions of token-shaped outputs hold 0"
    )


def _evidence(region: Region, program: Program) -> dict[str, float]:
    def products(nodes: Any) -> int:
        return sum(n.op == "call_function" and _packet(n) in _PRODUCTS for n in nodes)

    return {
        "packed_operators": float(len(region.nodes)),
        "packed_products": float(products(region.nodes)),
        "products": float(products(program.graph.nodes)),
    }


def _packet(node: fx.Node) -> str:
    return str(getattr(node.target, "overloadpacket", "")).rpartition(".")[2]


def _equal() -> Callable[[Any, Any], bool]:
    """Whether two nodes compute the same from the same inputs, by structure."""
    known: dict[tuple[fx.Node, fx.Node], bool] = {}

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a is b:
                return True
            if (a, b) not in known:
                known[a, b] = (
                    a.op == b.op != "placeholder"
                    and a.target == b.target
                    and torch.Tag.nondeterministic_seeded not in getattr(a.target, "tags", ())
                    and equal(a.args, b.args)
                    and equal(dict(a.kwargs), dict(b.kwargs))
                )
            return known[a, b]
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(equal, a, b))
        return type(a) is type(b) and bool(a == b)

    return equal
