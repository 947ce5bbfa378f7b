"""A phase's linear maps by an operator in C++ that multiplies one input by several weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.compiler.native import layouts
from attnopt.compiler.native.pages import Pages

aten = torch.ops.aten
_GATES: dict[Any, int] = {
    (aten.silu.default, "none"): 1,
    (aten.gelu.default, "tanh"): 2,
}  # as in gates.h


class LinearMaps:
    """The linear maps of a model's graphs through `run(x [..., in], weights, biases, outs, gate)`,
    which gives `[..., out]` of each weight, one behind the other. It takes weights as `layout`
    gives them, which are kept for all graphs; with a gate they are those of two maps in turns, of
    which one gates the other."""

    def __init__(
        self, run: Callable[..., Any], layout: Callable[[Sequence[Tensor]], Tensor]
    ) -> None:
        self.run, self.layout = run, layout
        self._pages = Pages()
        self._kept = dict[tuple[int, ...], tuple[Tensor, Tensor]]()
        self._seen = dict[int, tuple[Tensor, int, torch.dtype | None]]()  # by their identity

    @property
    def outdated(self) -> bool:
        """Whether a weight or bias was written to since it was read, as far as torch counts it."""
        return any(version(x) != was for x, was, _ in self._seen.values())

    def through(
        self, module: fx.GraphModule, where: Callable[[fx.Node], bool] = lambda _: True
    ) -> fx.GraphModule:
        """A graph `(inputs [..., in]) -> outputs` with its linear maps of constant float32 weights
        `[out, in]` and biases `[out]` on a CPU replaced, those of one input by one call, and where
        one gates the other (`_GATES`) with their product; it is changed in place, and returned.
        Weights that lose nothing in 16 bits are apart from others, and those that bfloat16 has no
        room for stay as they are.
        """
        groups = dict[object, list[fx.Node]]()
        for node in module.graph.find_nodes(op="call_function", target=aten.linear.default):
            dtype = self._dtype_of(module, node) if where(node) else None
            if dtype is not None:
                groups.setdefault((node.args[0], dtype), []).append(node)
        for nodes in groups.values():
            while (found := _gated(nodes)) is not None:
                self._replace(module, found.maps, found)
                nodes = [node for node in nodes if node not in found.maps]
            if nodes:
                self._replace(module, nodes)
        module.graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr")
        module.graph.lint()
        module.recompile()
        return module

    def _dtype_of(self, module: fx.GraphModule, node: fx.Node) -> torch.dtype | None:
        """The narrowest that holds the values of a linear map's weight; none where it is not to be
        replaced, as where bfloat16 has no room for them."""
        weight, bias = _operands(module, node)
        if weight is None or not _taken(node, weight, bias):
            return None
        if id(weight) not in self._seen:
            fits = bool(weight.detach().bfloat16().isfinite().all())
            dtype = layouts.shorter(weight.detach()).dtype if fits else None
            self._seen[id(weight)] = weight, version(weight), dtype
        return self._seen[id(weight)][2]

    def _replace(
        self, module: fx.GraphModule, nodes: Sequence[fx.Node], gated: Gated | None = None
    ) -> None:
        kept, name = self._of(module, nodes, gated is not None), f"_linear_maps_{nodes[0].name}"
        made_of = nodes if gated is None else [gated.product]
        outs = [int(node.meta["val"].shape[-1]) for node in made_of]
        with module.graph.inserting_before(nodes[0]):
            given = []
            for which, value in zip(("weights", "biases"), kept, strict=True):
                module.register_buffer(f"{name}_{which}", value, persistent=False)
                given.append(module.graph.get_attr(f"{name}_{which}"))
            gate = gated.gate if gated is not None else 0
            made = module.graph.call_function(self.run, (nodes[0].args[0], *given, outs, gate))
            for at, node in enumerate(made_of):
                ends = sum(outs[:at]), sum(outs[: at + 1])
                part = module.graph.call_function(aten.slice.Tensor, (made, -1, *ends))
                part.meta = dict(node.meta)
                node.replace_all_uses_with(part)
        for node in nodes if gated is None else (gated.product, gated.through, *nodes):
            module.graph.erase_node(node)

    def _of(
        self, module: fx.GraphModule, nodes: Sequence[fx.Node], gated: bool
    ) -> tuple[Tensor, Tensor]:
        """The weights and biases of linear maps, as one where one is gated by another."""
        held = [_operands(module, node) for node in nodes]
        key = (gated, *(id(x) for pair in held for x in pair))
        if key not in self._kept:
            weights = [weight.detach() for weight, _ in held if weight is not None]
            biases = [bias for _, bias in held]
            for bias in biases:
                if bias is not None:
                    self._seen[id(bias)] = bias, version(bias), None
            added = layouts.biases(biases, weights)
            if gated:
                weights = [layouts.paired(*weights)]
                added = layouts.paired(*added.chunk(2))
            self._kept[key] = self._pages.copied(self.layout(weights)), added.detach()
        return self._kept[key]


@dataclass(frozen=True)
class Gated:
    """The `product` of two linear maps of one input, the first of which goes `through` a gate."""

    maps: tuple[fx.Node, fx.Node]
    through: fx.Node
    product: fx.Node
    gate: int


def _gated(nodes: Sequence[fx.Node]) -> Gated | None:
    """The first such product of these linear maps of one input, if nothing else reads them."""
    for first, other in itertools.permutations(nodes, 2):
        through, product = _only_user(first), _only_user(other)
        if through is None or product is None or _only_user(through) is not product:
            continue
        how = (*through.args[1:], *through.kwargs.values(), "none")[0]
        gate = _GATES.get((through.target, how))
        if gate is None or product.target is not aten.mul.Tensor or product.kwargs:
            continue
        if first.meta["val"].shape == other.meta["val"].shape:
            return Gated((first, other), through, product, gate)
    return None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def version(x: Tensor) -> int:
    """How often torch has seen a tensor written to."""
    return 0 if x.is_inference() else x._version


def _taken(node: fx.Node, weight: Tensor | None, bias: Tensor | None) -> bool:
    if node.kwargs or weight is None or weight.dim() != 2:
        return False
    if node.args[2:] not in ((), (None,)) and (bias is None or bias.shape != weight.shape[:1]):
        return False
    return all(x.dtype == torch.float32 and x.device.type == "cpu"
               for x in (weight, bias) if x is not None)  # fmt: skip


def _operands(module: fx.GraphModule, node: fx.Node) -> tuple[Tensor | None, Tensor | None]:
    """The weight and the bias of a linear map, where they are constants."""
    weight, bias = (*node.args[1:], None)[:2]
    return _constant(module, weight), _constant(module, bias)


def _constant(module: fx.GraphModule, operand: object) -> Tensor | None:
    """The parameter or buffer that an operand is, if it is one."""
    if not isinstance(operand, fx.Node) or operand.op != "get_attr":
        return None
    owner, _, name = str(operand.target).rpartition(".")
    held = getattr(module.get_submodule(owner), name)
    return held if isinstance(held, Tensor) else None
