"""What the walk from a softmax passes by as if it did nothing, and when it may not: casts, copies,
inactive dropout and changes of shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.compiler.layout import same_size

aten = torch.ops.aten
CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
    aten._to_copy.default, aten.to.device_layout if hasattr(aten.to, "device_layout") else None,
)  # fmt: skip
SAME = (aten.contiguous.default, aten.clone.default, aten.dropout.default, aten.alias.default)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
CROSSED = (*CASTS, *SAME, *_RESHAPES)


@dataclass(frozen=True)
class Stop:
    """The walk ended at `node` for `reason`.

    `attention` is False when nothing here looks like attention. `passed` are the nodes that were
    understood on the way, the softmax first.
    """

    reason: str
    node: fx.Node
    help: str = ""
    attention: bool = True
    passed: tuple[fx.Node, ...] = ()


def active_dropout(node: fx.Node) -> Stop:
    """The reason to stop at a dropout that is not switched off."""
    return Stop("dropout is active, as in training", node, "call model.eval() or set it to 0")


def crossing(node: fx.Node) -> Stop | None:
    """Why a cast, copy or change of shape is not passed by as if it did nothing, or None."""
    args: Any = node.args
    before, after = args[0].meta["val"], node.meta["val"]
    if node.target is aten.dropout.default and args[1] and args[2]:
        return active_dropout(node)
    if node.target in CASTS and not (before.is_floating_point() and after.is_floating_point()):
        return Stop(f"the logits or weights are cast from {before.dtype} to {after.dtype}", node)
    if node.target in _RESHAPES and not (
        min(before.dim(), after.dim()) >= 2
        and all(same_size(before.shape[n], after.shape[n]) for n in (-2, -1))
    ):
        return Stop("a change of shape splits or merges the axes of queries and keys", node)
    return None
