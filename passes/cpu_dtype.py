"""Run the matrix products of a half-precision model in float32 on a CPU that has no half-precision
products.

Such a CPU emulates them, up to two orders of magnitude slower than float32. A product of half-
precision values is exact in float32 (11 + 11 and 8 + 8 significant bits fit into 24), sums are
taken in float32, and each result is rounded to the model's dtype where the model rounds it. So the
function is the same and only the rounding of sums and of what happens inside an attention changes,
to the finer side. That is a change of rounding, not bit-equality: `GUARDED`, the guard being this
CPU's flags.

Weights are converted once: those that only products read take twice the memory from then on, and
one that others read too (a tied embedding) is kept in both; the evidence counts the bytes.
Converting at every call would move each weight three times.

Source: the oneDNN developer guide, "Data types", on which instruction sets have native bf16 and
f16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, Scope
from attnopt.compiler.cpu_support import cpu_flags, native_products
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.packed_ops import PACKED_ATTENTION
from attnopt.compiler.program import Program, infer

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)
PRODUCTS = (
    aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default,
    aten.baddbmm.default, aten.matmul.default, aten.conv1d.default, aten.conv1d.padding,
    aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.convolution.default,
    aten.scaled_dot_product_attention.default, ATTENTION, PACKED_ATTENTION,
)  # fmt: skip


@dataclass(frozen=True)
class CpuDtype(Pass):
    """Linear layers, products, convolutions and attention in float32; every result in the model's
    dtype as before."""

    name: ClassVar[str] = "cpu_dtype"
    exactness: ClassVar[Exactness] = Exactness.GUARDED
    scope: ClassVar[Scope] = "program"
    source: ClassVar[str] = "oneDNN developer guide, Data types"
    after: ClassVar[tuple[str, ...]] = (
        "simplify_mask", "fold_repeated_kv", "fuse_attention", "merge_kv_heads", "latent_kv",
        "share_kv_layers",
        "prune_heads", "shrink_head_dim", "compress_attention", "low_rank_projections",
        "sliding_window",
        "skip_sublayers", "fuse_blocks", "refit", "heal", "unpad",
    )  # fmt: skip

    def rewrite(self, target: Any, program: Program, notes: Notes) -> Edit | Miss:
        if notes.target != "cpu":
            return Miss(f"the target is `{notes.target}`, not a CPU")
        found = [node for node in program.graph.nodes if _half(node) and node.target in PRODUCTS]
        if not found:
            return Miss("no matrix product of the program is in bfloat16 or float16")
        flags = cpu_flags()
        slow = [node for node in found if not native_products(node.meta["val"].dtype, flags)]
        if not slow:
            dtype = found[0].meta["val"].dtype
            return Miss(
                f"this CPU multiplies {_name(dtype)} natively ({native_products(dtype, flags)})",
                at=found[0].name,
            )
        names = tuple(node.name for node in slow)
        extra = sum(
            program.weight(w).nbytes * (2 if _shared(program, w, slow) else 1)
            for w in _weight_names(slow)
        )
        dtype_ = _name(slow[0].meta["val"].dtype)
        return Edit(
            graph=_edit(names),
            note=f"{len(slow)} products run in float32 because this CPU has no native {dtype_}: "
            f"a change of rounding, {extra / 2**20:.1f} MiB more for the weights",
            evidence={"products": float(len(slow)), "extra_bytes": float(extra)},
        )


def _edit(names: tuple[str, ...]) -> Callable[[Program], None]:
    def edit(copy: Program) -> None:
        nodes = [copy.node(name) for name in names]
        _widen_weights(copy, nodes)
        like = _like(copy, nodes)
        for node in nodes:
            _widen(copy, node, like)

    return edit


def _widen_weights(program: Program, products: list[fx.Node]) -> None:
    """Store the products' weights in float32; where others read one too, they keep the half-
    precision one."""
    for name in _weight_names(products):
        value = program.weight(name).float()
        readers = program.parameter_nodes(name)
        if not _shared(program, name, products):
            program.set_weight(name, value)
            for reader in readers:
                reader.meta["val"] = reader.meta["val"].float()
            continue
        first = next(n for n in program.graph.nodes if n.op == "call_function")
        wide = program.parameter(f"{name}_float32", value, before=first)
        for product in products:
            for reader in readers:
                product.replace_input_with(reader, wide)


def _weight_names(products: list[fx.Node]) -> list[str]:
    return sorted({str(g.target) for n in products for g in _weights(n)})


def _shared(program: Program, name: str, products: list[fx.Node]) -> bool:
    """Whether nodes that are none of the products read a parameter, as the embedding does that is
    tied to the last layer."""
    return any(u not in products for g in program.parameter_nodes(name) for u in g.users)


def _widen(program: Program, node: fx.Node, like: fx.Node | None) -> None:
    """Cast a product's half-precision inputs up and its result back down."""
    dtype = node.meta["val"].dtype
    users = list(node.users)
    made: dict[fx.Node, fx.Node] = {}
    for source in node.all_input_nodes:
        if _half(source):
            made[source] = program.call(*_up(source, like), before=node)
    node.args = fx.map_arg(node.args, lambda n: made.get(n, n))
    node.kwargs = fx.map_arg(node.kwargs, lambda n: made.get(n, n))
    infer(node)
    down = program.call(*_down(node, made, dtype), before=node.next)
    for user in users:
        user.replace_input_with(node, down)


def _up(source: fx.Node, like: fx.Node | None) -> tuple[Any, tuple[Any, ...]]:
    """The cast to float32, or to the dtype that the stored weights have, so that the program can be
    run in float64."""
    if like is None:
        return aten.to.dtype, (source, torch.float32)
    return aten.type_as.default, (source, like)


def _down(
    node: fx.Node, made: dict[fx.Node, fx.Node], dtype: torch.dtype
) -> tuple[Any, tuple[Any, ...]]:
    """The cast back to the dtype of an input, for the same reason."""
    source = next((n for n in made if n.op != "get_attr"), None)
    return (
        (aten.to.dtype, (node, dtype)) if source is None else (aten.type_as.default, (node, source))
    )


def _like(program: Program, products: list[fx.Node]) -> fx.Node | None:
    """A float32 weight that every product can see, moved before the first of them."""
    found = next((g for n in products for g in _weights(n, torch.float32)), None)
    if found is not None:
        next(n for n in program.graph.nodes if n.op != "placeholder").prepend(found)
    return found


def _weights(node: fx.Node, *dtypes: torch.dtype) -> list[fx.Node]:
    """The parameters that a product reads directly, in half precision unless told otherwise."""
    return [
        n
        for n in node.all_input_nodes
        if n.op == "get_attr" and n.meta["val"].dtype in (dtypes or HALVES)
    ]


def _half(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in HALVES


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
