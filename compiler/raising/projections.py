"""Projections: products of an activation with a 2-D parameter, and the walks that reach them from
an attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.compiler.site import WeightLayout

aten = torch.ops.aten
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
_SINKS = ("output", "placeholder")


@dataclass(frozen=True)
class Projection:
    """One matrix product with a parameter: `node` [.., out] = `source` [.., in] W (+ bias)."""

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    layout: WeightLayout

    @property
    def width(self) -> int:
        """Output channels."""
        return int(self.node.meta["val"].shape[-1])


def projection(node: fx.Node) -> Projection | None:
    """The node as a projection, or None."""
    if node.op != "call_function":
        return None
    args: Any = node.args
    if node.target is aten.linear.default:
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
        return _made(node, args[0], args[1], bias, "out_in")
    if node.target is aten.addmm.default:
        return _made(node, args[1], args[2], args[0], "in_out")
    if node.target in (aten.mm.default, aten.matmul.default):
        return _made(node, args[0], args[1], None, "in_out")
    return None


def _made(
    node: fx.Node, source: Any, weight: Any, bias: Any, layout: WeightLayout
) -> Projection | None:
    flipped = isinstance(weight, fx.Node) and weight.target in _TRANSPOSES
    if flipped:
        weight = weight.args[0]
        layout = "out_in" if layout == "in_out" else "in_out"
    if (
        not isinstance(weight, fx.Node)
        or weight.op != "get_attr"
        or not isinstance(source, fx.Node)
    ):
        return None
    if weight.meta["val"].dim() != 2 or source.op == "get_attr":
        return None
    named = bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
    if bias is not None and named is None:
        return None
    return Projection(
        node, source, str(weight.target), str(named.target) if named else None, layout
    )


def above(operand: fx.Node) -> tuple[list[Projection], set[fx.Node]]:
    """The nearest projections that an operand comes from, and the nodes between them and the
    operand (inclusive)."""
    found: list[Projection] = []
    seen: set[fx.Node] = set()
    stack = [operand]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        made = projection(node)
        if made is not None:
            found.append(made)
            continue
        stack.extend(node.all_input_nodes)
    between = _descendants({p.node for p in found}, seen)
    return found, between


def _descendants(roots: set[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    stack = [user for root in roots for user in root.users if user in within]
    while stack:
        node = stack.pop()
        if node in reached:
            continue
        reached.add(node)
        stack.extend(user for user in node.users if user in within)
    return reached


def below(node: fx.Node) -> list[Projection]:
    """The nearest projections that read a node's value."""
    found: list[Projection] = []
    seen: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop(0)
        if user in seen or user.op in _SINKS:
            continue
        seen.add(user)
        made = projection(user)
        if made is not None:
            if made.source in seen or made.source is node:
                found.append(made)
            continue
        stack.extend(user.users)
        if len(seen) > 64:
            break
    return found
