"""Run part of a graph on small concrete tensors: the instrument under every probe.

Symbols get small sizes, inputs get tensors of that size cut from the example, chosen nodes get the
probe's own tensors, and everything else is computed from the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from attnopt.compiler.device import CPU
from attnopt.compiler.program import Program, attribute

LIMIT = (
    1 << 26
)  # elements of one probe tensor; larger means that a probe was aimed at the wrong node


class Unknown(Exception):
    """The node could not be evaluated; the message names it and says why."""


class Evaluator:
    """Evaluates nodes of one program at given symbol sizes, on the CPU wherever the program is.

    `sizes` maps symbol name -> int; symbols not named keep the example's size. `given` maps node ->
    tensor. `override`, when set, may replace the value of a node (probes freeze norms with it).
    Results are kept for the evaluator's lifetime.
    """

    def __init__(
        self,
        program: Program,
        sizes: Mapping[str, int],
        given: Mapping[fx.Node, Any] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        override: Callable[[fx.Node, Any], Any] | None = None,
    ) -> None:
        self.program = program
        self.sizes = {**example_sizes(program), **sizes}
        self.given = dict(given or {})
        self.inputs = dict(inputs or {})
        self.override = override
        self.values: dict[fx.Node, Any] = dict(self.given)
        self._concrete: dict[Any, int] = {}
        self.away = program.device != CPU

    def __call__(self, node: fx.Node) -> Any:
        """The value of a node.

        Raises Unknown.
        """
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self.values:
                stack.pop()
                continue
            waiting = [n for n in top.all_input_nodes if n not in self.values]
            if waiting and self._size(top) is None:
                stack.extend(waiting)
                continue
            self.values[top] = self._run(top)
            stack.pop()
        return self.values[node]

    def _run(self, node: fx.Node) -> Any:
        size = self._size(node)
        if size is not None:
            return size
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            return _parameter(attribute(self.program.module, str(node.target)))
        if node.op != "call_function":
            raise Unknown(f"`{node.name}` is a {node.op}")
        self._check_size(node)
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: self.values[n])
        if self.away:
            args, kwargs = map_aggregate((args, kwargs), _on_cpu)
        try:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise Unknown(f"`{node.name}` ({node.target}): {str(error).splitlines()[0]}") from error
        return value if self.override is None else self.override(node, value)

    def _size(self, node: fx.Node) -> int | None:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return self._at(value)
        if isinstance(value, int) and not isinstance(value, bool) and node.op == "call_function":
            return value
        return None

    def _check_size(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return
        count = 1
        for size in value.shape:
            count *= max(1, self._at(size))
        if count > LIMIT and not any(n in self.given for n in node.all_input_nodes):
            raise Unknown(f"`{node.name}` would hold {count} elements")

    def _input(self, node: fx.Node) -> Any:
        if node.name in self.inputs:
            return self.inputs[node.name]
        example = example_input(self.program, node)
        if not isinstance(example, Tensor):
            return example
        return resized(example.cpu(), [self._at(size) for size in node.meta["val"].shape])

    def _at(self, size: Any) -> int:
        """A size at the evaluator's sizes; substitution is slow, and few sizes differ."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        if size.node.expr not in self._concrete:
            self._concrete[size.node.expr] = concrete(size, self.sizes)
        return self._concrete[size.node.expr]


def example_input(program: Program, node: fx.Node) -> Any:
    """The example value of a placeholder."""
    from torch.utils import _pytree as pytree

    names = [n.name for n in program.graph.find_nodes(op="placeholder")]
    leaves = pytree.tree_leaves((program.example.args, dict(program.example.kwargs)))
    if set(names) == set(program.example.kwargs):
        return program.example.kwargs[node.name]
    return leaves[names.index(node.name)]


def resized(tensor: Tensor, shape: list[int]) -> Tensor:
    """The tensor tiled and cut to a shape of the same rank."""
    for dim, size in enumerate(shape):
        if tensor.shape[dim] < size:
            times = [1] * tensor.dim()
            times[dim] = -(-size // max(1, tensor.shape[dim]))
            tensor = tensor.repeat(times)
        tensor = tensor.narrow(dim, 0, size)
    return tensor


def example_sizes(program: Program) -> dict[str, int]:
    """Symbol name -> size in the example inputs."""
    found: dict[str, int] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        example = example_input(program, node)
        shape: tuple[Any, ...] = tuple(value.shape)
        for dim, size in enumerate(shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(str(size.node.expr), int(example.shape[dim]))
    return found


def concrete(size: Any, sizes: Mapping[str, int]) -> int:
    """A size, symbolic or not, at the given symbol sizes.

    Raises Unknown for a symbol with no size.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    known = {s: sizes[str(s)] for s in expression.free_symbols if str(s) in sizes}
    value = expression.subs(known)
    if value.free_symbols:
        raise Unknown(f"size `{expression}` depends on values in the inputs")
    return int(value)


def _parameter(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "meta":
        if value.numel() > LIMIT:
            raise Unknown("a probe needs the values of a weight that has none (meta device)")
        return torch.ones(value.shape, dtype=value.dtype)
    return value.detach().cpu()


def _on_cpu(leaf: Any) -> Any:
    return CPU if isinstance(leaf, torch.device) else leaf
