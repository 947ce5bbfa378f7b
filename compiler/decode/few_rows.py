"""A step's linear maps by the operator `attnopt::few_rows`: those of one input in one call, and
weights that lose nothing in 16 bits read as such."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_TOGETHER = 3  # weights that a call takes


def with_few_rows(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph `(inputs [..., in]) -> outputs` with its linear maps of constant float32
    weights `[out, in]` through `few_rows`; it is changed in place, and returned.

    A weight that is the same in bfloat16 or float16, as it is where the checkpoint is of such a
    dtype, gets a copy that a few rows read instead: half of the bytes, the same products. The
    operator must have been loaded with `attnopt.compiler.native.ready`.
    """
    graph = module.graph
    groups = dict[fx.Node, list[fx.Node]]()
    for node in _linears(module):
        groups.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    copies = _copies(module, [node for nodes in groups.values() for node in nodes])
    first = graph.find_nodes(op="placeholder")[-1]
    for constant in graph.find_nodes(op="get_attr"):  # a call needs the weights of later nodes
        first.append(constant)
    for nodes in groups.values():
        for at in range(0, len(nodes), _TOGETHER):
            _join(graph, nodes[at : at + _TOGETHER], copies)
    graph.lint()
    module.recompile()
    return module


def _join(graph: fx.Graph, nodes: list[fx.Node], copies: dict[str, fx.Node]) -> None:
    operands = list[Any]()
    for node in nodes:
        weight, bias = cast(tuple[fx.Node, fx.Node | None], (*node.args[1:], None)[:2])
        operands += (weight, bias, copies.get(str(weight.target)))
    operands += [None] * (3 * _TOGETHER - len(operands))
    with graph.inserting_before(nodes[0]):
        made = graph.call_function(
            torch.ops.attnopt.few_rows.default, (nodes[0].args[0], *operands)
        )
        start = 0
        for node in nodes:
            end = start + int(node.meta["val"].shape[-1])
            part = graph.call_function(aten.slice.Tensor, (made, -1, start, end))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
            start = end
    for node in nodes:
        graph.erase_node(node)


def _copies(module: fx.GraphModule, linears: list[fx.Node]) -> dict[str, fx.Node]:
    """Constants that hold the weights of linear maps in 16 bits, by the weights' names, where
    nothing is lost."""
    made = dict[str, fx.Node]()
    for linear in linears:
        weight = cast(fx.Node, linear.args[1])
        name, value = str(weight.target), _constant(module, weight)
        short = None if value is None or name in made else shorter(value)
        if short is None:
            continue
        held = f"_few_rows_{len(made)}"
        module.register_buffer(held, short, persistent=False)
        with module.graph.inserting_before(weight):
            made[name] = module.graph.get_attr(held)
            made[name].meta["val"] = weight.meta["val"].to(short.dtype)
    return made


def shorter(weight: Tensor) -> Tensor | None:
    """The weight in 16 bits, where every value of it is the same there."""
    for dtype in (torch.bfloat16, torch.float16):
        short = weight.detach().to(dtype)
        if torch.equal(short.float(), weight):
            return short
    return None


def _linears(module: fx.GraphModule) -> Iterator[fx.Node]:
    for node in module.graph.find_nodes(op="call_function", target=aten.linear.default):
        held = [_constant(module, operand) for operand in node.args[1:] if operand is not None]
        if node.kwargs or not all(_taken(x) for x in held):
            continue
        weight = held[0]
        if weight is not None and weight.dim() == 2 and weight.is_contiguous():
            yield node


def _taken(x: Tensor | None) -> bool:
    return x is not None and x.dtype == torch.float32 and x.device.type == "cpu"


def _constant(module: fx.GraphModule, operand: object) -> Tensor | None:
    """The parameter or buffer that an operand is, if it is one."""
    if not isinstance(operand, fx.Node) or operand.op != "get_attr":
        return None
    owner, _, name = str(operand.target).rpartition(".")
    held = getattr(module.get_submodule(owner), name)
    return held if isinstance(held, Tensor) else None
