"""A phase's linear maps by an operator in C++ that multiplies one input by several weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.compiler.native import layouts

aten = torch.ops.aten


class LinearMaps:
    """The linear maps of a model's graphs through `run(x [..., in], weights, biases, outs)`, which
    gives for each weight `[..., out]`, or where `joined` all of these as one; it takes weights as
    `layout` gives them, which are kept for all graphs."""

    def __init__(
        self, run: Callable[..., Any], layout: Callable[[Sequence[Tensor]], Tensor], joined: bool
    ) -> None:
        self.run, self.layout, self.joined = run, layout, joined
        self._kept = dict[tuple[str, ...], tuple[Tensor, Tensor]]()

    def through(self, module: fx.GraphModule) -> fx.GraphModule:
        """A graph `(inputs [..., in]) -> outputs` with its linear maps of constant float32 weights
        `[out, in]` and biases `[out]` on a CPU replaced, those of one input by one call; it is
        changed in place, and returned. Weights that lose nothing in 16 bits are apart from others.
        """
        groups = dict[object, list[fx.Node]]()
        for node, weight in _linears(module):
            key = node.args[0], layouts.shorter(weight).dtype
            groups.setdefault(key, []).append(node)
        for at, nodes in enumerate(groups.values()):
            self._replace(module, nodes, f"_linear_maps_{at}")
        module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr")
        module.graph.lint()
        module.recompile()
        return module

    def _replace(self, module: fx.GraphModule, nodes: Sequence[fx.Node], name: str) -> None:
        kept = self._of(module, nodes)
        with module.graph.inserting_before(nodes[0]):
            given = []
            for which, value in zip(("weights", "biases"), kept, strict=True):
                module.register_buffer(f"{name}_{which}", value, persistent=False)
                given.append(module.graph.get_attr(f"{name}_{which}"))
            outs = [int(node.meta["val"].shape[-1]) for node in nodes]
            made = module.graph.call_function(self.run, (nodes[0].args[0], *given, outs))
            for at, node in enumerate(nodes):
                if self.joined:
                    ends = sum(outs[:at]), sum(outs[: at + 1])
                    part = module.graph.call_function(aten.slice.Tensor, (made, -1, *ends))
                else:
                    part = module.graph.call_function(operator.getitem, (made, at))
                part.meta = dict(node.meta)
                node.replace_all_uses_with(part)
        for node in nodes:
            module.graph.erase_node(node)

    def _of(self, module: fx.GraphModule, nodes: Sequence[fx.Node]) -> tuple[Tensor, Tensor]:
        """The weights and biases of linear maps, by their names."""
        names = tuple(str(operand) for node in nodes for operand in (*node.args[1:], None)[:2])
        if names not in self._kept:
            held = [_operands(module, node) for node in nodes]
            weights = [weight.detach() for weight, _ in held if weight is not None]
            added = layouts.biases([bias for _, bias in held], weights).detach()
            self._kept[names] = self.layout(weights), added
        return self._kept[names]


def _linears(module: fx.GraphModule) -> Iterator[tuple[fx.Node, Tensor]]:
    """The linear maps, and their weights."""
    for node in module.graph.find_nodes(op="call_function", target=aten.linear.default):
        weight, bias = _operands(module, node)
        if node.kwargs or weight is None or weight.dim() != 2 or not _taken(weight):
            continue
        if node.args[2:] in ((), (None,)) or (bias is not None and _taken(bias)):
            yield node, weight.detach()


def _operands(module: fx.GraphModule, node: fx.Node) -> tuple[Tensor | None, Tensor | None]:
    """The weight and the bias of a linear map, where they are constants."""
    weight, bias = (*node.args[1:], None)[:2]
    return _constant(module, weight), _constant(module, bias)


def _taken(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _constant(module: fx.GraphModule, operand: object) -> Tensor | None:
    """The parameter or buffer that an operand is, if it is one."""
    if not isinstance(operand, fx.Node) or operand.op != "get_attr":
        return None
    owner, _, name = str(operand.target).rpartition(".")
    held = getattr(module.get_submodule(owner), name)
    return held if isinstance(held, Tensor) else None
