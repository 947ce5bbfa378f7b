"""A phase's linear maps by an operator in C++ that multiplies one input by several weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
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
_TOGETHER = 1 << 26  # bytes of weights from which on they begin another tensor
Key = tuple[int, ...]  # identities of weights and biases


@dataclass(frozen=True)
class Kept:
    """Weights and biases of one call, and where in these tensors they begin."""

    weights: Tensor
    biases: Tensor | None
    at: tuple[int, int]


class LinearMaps:
    """The linear maps of a model's graphs through `run(x [..., in], weights, biases, at, outs,
    gate)`, which gives `[..., out]` of each weight, one behind the other. It takes weights as
    `layout` gives them, of many maps one behind the other, which are kept for all graphs; with a
    gate they are those of two maps in turns, of which one gates the other."""

    def __init__(
        self, run: Callable[..., Any], layout: Callable[[Sequence[Tensor]], Tensor]
    ) -> None:
        self.run, self.layout = run, layout
        self._pages = Pages()
        self._kept = dict[Key, Kept]()
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
        found = list[Maps]()
        for nodes in groups.values():
            while (gated := _gated(nodes)) is not None:
                found.append(gated)
                nodes = [node for node in nodes if node not in gated.nodes]
            if nodes:
                found.append(Maps(nodes))
        self._keep(module, found)
        for maps in found:
            self._replace(module, maps)
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

    def _replace(self, module: fx.GraphModule, maps: Maps) -> None:
        kept, nodes, outputs = self._kept[_key(module, maps)], maps.nodes, maps.outputs
        outs = [int(node.meta["val"].shape[-1]) for node in outputs]
        with module.graph.inserting_before(nodes[0]):
            weights, biases = (
                None if x is None else module.graph.get_attr(_attribute(module, x))
                for x in (kept.weights, kept.biases)
            )
            given = (nodes[0].args[0], weights, biases, list(kept.at), outs, maps.gate)
            made = module.graph.call_function(self.run, given)
            for at, node in enumerate(outputs):
                ends = sum(outs[:at]), sum(outs[: at + 1])
                part = module.graph.call_function(aten.slice.Tensor, (made, -1, *ends))
                part.meta = dict(node.meta)
                node.replace_all_uses_with(part)
        for node in (*reversed(maps.after), *nodes):
            module.graph.erase_node(node)

    def _keep(self, module: fx.GraphModule, found: Sequence[Maps]) -> None:
        """Lay out the weights and biases of the maps that have not been met before. Those of
        several calls are one tensor: to hand a compiled step another one takes it as long as to
        read 20 KB of weights."""
        new = dict[Key, tuple[Tensor, Tensor | None]]()
        for maps in found:
            key = _key(module, maps)
            if key not in self._kept and key not in new:
                new[key] = self._laid_out(module, maps)
            if sum(weights.nbytes for weights, _ in new.values()) >= _TOGETHER:
                self._join(new)
                new.clear()
        self._join(new)

    def _laid_out(self, module: fx.GraphModule, maps: Maps) -> tuple[Tensor, Tensor | None]:
        held = [_operands(module, node) for node in maps.nodes]
        weights = [weight.detach() for weight, _ in held if weight is not None]
        biases = [bias for _, bias in held]
        for bias in biases:
            if bias is not None:
                self._seen[id(bias)] = bias, version(bias), None
        added = layouts.biases(biases, weights)
        if maps.gate:
            weights = [layouts.paired(*weights)]
            added = None if added is None else layouts.paired(*added.chunk(2))
        return self.layout(weights), added

    def _join(self, new: Mapping[Key, tuple[Tensor, Tensor | None]]) -> None:
        alike = dict[object, list[Key]]()
        for key, (weights, _) in new.items():
            alike.setdefault((weights.dtype, weights.shape[1:]), []).append(key)
        for keys in alike.values():
            parts = [new[key] for key in keys]
            added = [biases for _, biases in parts if biases is not None]
            joined = self._pages.joined([weights for weights, _ in parts])
            biases = torch.cat(added).detach() if added else None
            rows = numbers = 0
            for key, (of, add) in zip(keys, parts, strict=True):
                self._kept[key] = Kept(joined, None if add is None else biases, (rows, numbers))
                rows += len(of)
                numbers += 0 if add is None else len(add)


@dataclass(frozen=True)
class Maps:
    """Linear maps of one input that one call computes and, where the first of two goes through a
    `gate` and is multiplied with the other, what comes `after` them, the product last."""

    nodes: Sequence[fx.Node]
    gate: int = 0
    after: tuple[fx.Node, ...] = ()

    @property
    def outputs(self) -> Sequence[fx.Node]:
        """What a call of the operator gives."""
        return self.after[-1:] or self.nodes


def _key(module: fx.GraphModule, maps: Maps) -> Key:
    """Maps of the same weights and biases have the same."""
    return maps.gate > 0, *(id(x) for node in maps.nodes for x in _operands(module, node))


def _attribute(module: fx.GraphModule, x: Tensor) -> str:
    """The name of a tensor among what a graph keeps; it is one input where that is compiled."""
    held = dict(module.named_buffers(recurse=False))
    for name, buffer in held.items():
        if buffer is x:
            return name
    name = f"_linear_maps_{len(held)}"
    module.register_buffer(name, x, persistent=False)
    return name


def _gated(nodes: Sequence[fx.Node]) -> Maps | None:
    """The first two of these linear maps of one input of which one gates the other, if nothing else
    reads them."""
    for first, other in itertools.permutations(nodes, 2):
        through, product = _only_user(first), _only_user(other)
        if through is None or product is None or _only_user(through) is not product:
            continue
        how = (*through.args[1:], *through.kwargs.values(), "none")[0]
        gate = _GATES.get((through.target, how))
        if gate is None or product.target is not aten.mul.Tensor or product.kwargs:
            continue
        if first.meta["val"].shape == other.meta["val"].shape:
            return Maps((first, other), gate, (through, product))
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
