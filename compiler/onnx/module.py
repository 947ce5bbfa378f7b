"""`OnnxModule`: an ONNX graph as a torch module, run operator by operator with torch's functions.

It exists to be traced. A node runs inside a submodule that has the node's path, so that what is
traced says which node of the file it came from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.onnx import (  # noqa: F401 - they fill the table
    attention,
    contrib,
    contrib_attention,
    convolutions,
    elementwise,
    indexing,
    norms,
    products,
    reductions,
    shapes,
)
from attnopt.compiler.onnx.graph import Graph, Node, dotted
from attnopt.compiler.onnx.host import Value, constant, small, tensor
from attnopt.compiler.onnx.table import lookup


class Scope(nn.Module):
    """A place in the tree of modules; calls what it is given."""

    def forward(self, function: Callable[..., Any], *values: Any) -> Any:
        """The function of the values."""
        return function(*values)


class OnnxModule(nn.Module):
    """A graph whose operators are all in the table; takes its inputs by name or in order, and
    returns its outputs by name.

    Names that Python does not take, and those that come out alike, are changed as `identifiers`
    says.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph
        names = list(graph.input_names.values())
        signature = inspect.Signature(
            [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        )

        def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            given = signature.bind(*args, **kwargs).arguments
            return self._run([given[name] for name in names])

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward
        # In dicts, so that a node called `training` is no attribute of this module.
        self._scopes = {node.name: (self._place(node.path),) for node in graph.nodes}
        self._numbers: dict[str, Value] = {}
        self._weights: dict[str, tuple[nn.Module, str]] = {}
        scales = _scales(graph)
        for name, value in graph.constants.items():
            self._keep(name, value, name in scales)

    @property
    def graph(self) -> Graph:
        """The graph that runs."""
        return self._graph

    def _keep(self, name: str, value: Tensor, scale: bool) -> None:
        """A constant as numbers, a parameter or a buffer."""
        made = small(value) if scale else constant(value)
        if not isinstance(made, Tensor):
            self._numbers[name] = made
            return
        path, _, leaf = dotted(name).rpartition(".")
        owner = self._place(path)
        while hasattr(owner, leaf):
            leaf += "_"
        if made.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(made, requires_grad=False))
        else:
            owner.register_buffer(leaf, made)
        self._weights[name] = owner, leaf

    def _place(self, path: str) -> nn.Module:
        """The submodule at a path, made where it is missing."""
        owner: nn.Module = self
        for part in filter(None, path.split(".")):
            while part not in owner._modules and hasattr(owner, part):
                part += "_"
            if part not in owner._modules:
                owner._modules[part] = Scope()
            child = owner._modules[part]
            assert child is not None
            owner = child
        return owner

    def _run(self, given: list[Tensor]) -> dict[str, Tensor]:
        values: dict[str, Value] = dict(self._numbers)
        for name, (owner, leaf) in self._weights.items():
            values[name] = getattr(owner, leaf)
        values.update(zip((item.name for item in self._graph.inputs), given, strict=True))
        for node in self._graph.nodes:
            read = [values[name] if name else None for name in node.inputs]
            made = self._scopes[node.name][0](_Call(node), *read)
            made = made if isinstance(made, tuple) else (made,)
            values.update(zip(node.outputs, made, strict=False))
        made = self._graph.output_names.items()
        return {ours: tensor(values[name]) for name, ours in made}


def _scales(graph: Graph) -> set[str]:
    """All values that the scales of a Resize are computed from, up to shapes."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    resizes = [node for node in graph.nodes if node.operator == "Resize"]
    waiting = [name for node in resizes for name in node.inputs[2:3]]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if not name or name in found:
            continue
        found.add(name)
        if name in makers and makers[name].operator not in ("Shape", "Size"):
            waiting += makers[name].inputs
    return found


class _Call:
    """The function of a node, which names the node where it fails."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def __call__(self, *values: Any) -> Any:
        function = lookup(self.node)
        assert function is not None
        try:
            return function(self.node, *values)
        except Problem as problem:
            problem.where = problem.where or f"{self.node.name} ({self.node.type})"
            raise
