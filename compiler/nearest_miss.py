"""The nearest miss of an attention that was left alone: which steps of it were understood, where
the walk stopped, and what stands beyond that step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.compiler.excerpt import place
from attnopt.compiler.program import Program
from attnopt.compiler.raising.anchor import SDPA, SOFTMAX
from attnopt.compiler.raising.crossing import CROSSED
from attnopt.compiler.raising.logits import PRODUCTS
from attnopt.compiler.site import Unraised
from attnopt.compiler.stack import own

aten = torch.ops.aten
_STEPS = (
    "between softmax and scores a scale, a bias, a mask, a soft cap `c * tanh(x / c)`, sink logits "
    "and casts are understood: write the step as one of these, or move it out of the attention"
)
_WEIGHTS = (
    "the softmax's result has to meet the values in a matrix product, with nothing but casts, "
    "copies and inactive dropout on the way"
)
_FAR = 24  # steps that are looked at beyond the one that was not understood
_ROLES = {
    "mul": "a scale, or the outside of a soft cap", "div": "a scale", "add": "a bias or mask",
    "sub": "a bias or mask", "masked_fill": "a mask", "where": "a mask", "cat": "sink logits",
    "slice": "the sinks' weights cut off", "maximum": "a lower bound", "max": "a lower bound",
    "clamp_min": "a lower bound", "clamp": "a lower bound",
}  # fmt: skip


def steps(program: Program, found: Unraised) -> tuple[str, ...]:
    """What was recognised of an attention before the walk stopped, and what was not reached, as
    sentences."""
    nodes = {node.name: node for node in program.graph.nodes}
    guilty = nodes.get(found.node)
    passed = [nodes[name] for name in found.passed if name in nodes]
    passed = [node for node in passed if node.target in SOFTMAX or node is not guilty]
    told = [f"understood: {role}: {written(node)}" for node, role in _roles(passed)]
    if guilty is not None:
        told.append(f"it stops at {written(guilty)}")
        told += _beyond(guilty, passed)
    return tuple(told)


def mend(program: Program, found: Unraised) -> str:
    """How the attention could be understood, by where the walk stopped."""
    nodes = {node.name: node for node in program.graph.nodes}
    products = [n for n in found.passed if n in nodes and nodes[n].target in PRODUCTS]
    usual = {0: _WEIGHTS, 1: _STEPS}.get(len(products), "") if found.passed else ""
    told = found.help or usual
    node = nodes.get(found.node)
    frame = None if node is None else own(node)
    if frame is not None and "site-packages" in frame.file:
        told += f"{'; ' if told else ''}the line is a library's: try its other spelling with "
        told += "--attention eager or sdpa"
    left = "as it is, the attention is left alone and runs as before"
    return f"{told}; {left}" if told else left


def written(node: fx.Node) -> str:
    """A node with its operator, its operands' and its own shape, and its line."""
    at = place(node)
    operands = [_sizes(a) for a in node.all_input_nodes if _sizes(a)]
    read = f" reads {', '.join(operands[:3])}," if operands else ""
    made = f" makes {_sizes(node)} {_dtype(node)}" if _sizes(node) else ""
    return f"`{node.name}` ({_target(node)}){read}{made}{f' at {at}' if at else ''}"


def _roles(passed: list[fx.Node]) -> Iterator[tuple[fx.Node, str]]:
    """The nodes that were understood, each with what it was taken for."""
    products = 0
    for node in passed:
        if node.target in SOFTMAX:
            yield node, "the softmax over the keys"
        elif node.target in PRODUCTS:
            products += 1
            yield node, "the product with the values" if products == 1 else "the product of q and k"
        elif node.target is SDPA:
            yield node, "the fused operator"
        else:
            name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "").strip("_")
            same = "a cast, copy or change of shape"
            yield node, same if node.target in CROSSED else _ROLES.get(name, "a step")


def _beyond(guilty: fx.Node, passed: list[fx.Node]) -> Iterator[str]:
    """What would have been looked for beyond the step that was not understood."""
    products = [node for node in passed if node.target in PRODUCTS]
    if len(products) >= 2 or not passed:
        return
    downwards = not products
    above = _nearest(guilty if not downwards else passed[0])
    if downwards and guilty.target not in PRODUCTS:
        yield "no product with the values was reached from the softmax"
    if above is None:
        yield "no product of two activations stands above it, so there may be no q and k at all"
    elif above is not guilty:
        yield f"not reached: what looks like the product of q and k: {written(above)}"


def _nearest(node: fx.Node) -> fx.Node | None:
    """The nearest product of two activations above a node."""
    waiting, seen = [node], {node}
    while waiting and len(seen) < 8 * _FAR:
        at = waiting.pop(0)
        if at.target in PRODUCTS and all(a.op != "get_attr" for a in at.all_input_nodes):
            return at
        fresh = [a for a in at.all_input_nodes if a not in seen]
        seen.update(fresh)
        waiting += fresh
    return None


def _target(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else node.op


def _sizes(node: fx.Node) -> str:
    value: Any = node.meta.get("val")
    return f"{[_size(size) for size in value.shape]}" if isinstance(value, Tensor) else ""


def _dtype(node: fx.Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _size(size: Any) -> Any:
    """A size as it was in the trace; a symbol has it as its hint."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return size if hint is None else hint
