"""Halves of heads that change places, as rotary embeddings have it, in a form that torch.compile
fuses on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_LANES = 16  # numbers of float32 in the widest register: other halves are read one by one


def flipped(module: fx.GraphModule) -> fx.GraphModule:
    """A graph with `cat((-x[..., h:], x[..., :h]), -1)` of a last dim of 2 h as a flip of the two
    halves with signs; it is changed in place, and returned. The numbers stay the same.

    Inductor writes what is joined to memory part by part, in loops of their own, and computes a
    flip where it is read.
    """
    signs = dict[tuple[torch.dtype, torch.device], str]()
    for node in module.graph.find_nodes(op="call_function", target=aten.cat.default):
        found = _turned(node)
        if found is None:
            continue
        (source, half), (less, left) = found, node.args[0]
        x = source.meta["val"]
        if (x.dtype, x.device) not in signs:
            name = signs[x.dtype, x.device] = f"_signs_of_halves_{len(signs)}"
            made = torch.tensor([[-1], [1]], dtype=x.dtype, device=x.device)
            module.register_buffer(name, made, persistent=False)
        with module.graph.inserting_before(node):
            turned = source
            for target, *args in (
                (aten.unflatten.int, -1, (2, half)), (aten.flip.default, (-2,)),
                (aten.mul.Tensor, module.graph.get_attr(signs[x.dtype, x.device])),
                (aten.flatten.using_ints, -2),
            ):  # fmt: skip
                turned = module.graph.call_function(target, (turned, *args))
        turned.meta = dict(node.meta)
        node.replace_all_uses_with(turned)
        for dead in (node, less, less.args[0], left):
            if not dead.users:
                module.graph.erase_node(dead)
    module.graph.lint()
    module.recompile()
    return module


def _turned(node: fx.Node) -> tuple[fx.Node, int] | None:
    """What the node turns, and the width of a half of it."""
    parts: Any = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else 0
    if not (isinstance(parts, (list, tuple)) and len(parts) == 2):
        return None
    less, left = parts
    if not (isinstance(less, fx.Node) and less.target is aten.neg.default):
        return None
    right = less.args[0]
    source = left.args[0] if isinstance(left, fx.Node) and left.args else None
    x = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not (isinstance(x, Tensor) and x.dim() and dim in (-1, x.dim() - 1)):
        return None
    assert isinstance(source, fx.Node)
    half, odd = divmod(x.shape[-1], 2) if isinstance(x.shape[-1], int) else (0, 1)
    if odd or not half or half % _LANES or not x.dtype.is_floating_point:
        return None
    whole = _part(left, source, 0, half) and _part(right, source, half, 2 * half)
    return (source, half) if whole else None


def _part(node: Any, source: fx.Node, start: int, end: int) -> bool:
    """Whether a node is the numbers `start` to `end` of the source's last dim."""
    if not (isinstance(node, fx.Node) and node.target is aten.slice.Tensor):
        return False
    operands: list[Any] = [*node.args, *[None] * 4]
    given, dim, first, last, step = operands[:5]
    x = source.meta["val"]
    return (
        given is source and dim in (-1, x.dim() - 1) and (first or 0) == start
        and (step or 1) == 1 and not node.kwargs
        and (last == end or (end == x.shape[-1] and (last is None or last > end)))
    )  # fmt: skip
