"""The table of operators: each is one small function from values to values.

A function takes the node and its inputs (None where one is left out) and returns the outputs, one
alone or a tuple. Importing a module of operators enters its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attnopt.compiler.errors import Problem
from attnopt.compiler.onnx.graph import STANDARD, Graph, Node

Operator = Callable[..., Any]
MICROSOFT = "com.microsoft"
FIRST, LAST = 17, 24  # the opsets whose operators these are

_TABLE: dict[tuple[str, str], Operator] = {}


def operator(*names: str, domain: str = STANDARD) -> Callable[[Operator], Operator]:
    """Enter a function under one or more operator types of a domain."""

    def enter(function: Operator) -> Operator:
        for name in names:
            _TABLE[domain, name] = function
        return function

    return enter


def lookup(node: Node) -> Operator | None:
    """The function of a node, or None."""
    return _TABLE.get((node.domain, node.operator))


def names() -> list[str]:
    """All operators that can be read, as `Node.type` spells them."""
    return sorted(f"{domain}.{name}" if domain else name for domain, name in _TABLE)


def check_supported(graph: Graph, where: str) -> None:
    """Raise `Problem` A126 that lists every node whose operator is not in the table."""
    missing = [node for node in graph.nodes if lookup(node) is None]
    if not missing:
        return
    types = sorted({node.type for node in missing})
    count = len(missing)
    raise Problem(
        "A126",
        f"{count} node{'s' * (count > 1)} of {len(graph.nodes)} cannot be read: {', '.join(types)}",
        where=where,
        why=listed(missing),
        help="export the model with other operators, or give the PyTorch model itself",
    )


def listed(nodes: Sequence[Node]) -> str:
    """Nodes by name and type, all of them."""
    return "; ".join(f"{node.name} ({node.type})" for node in nodes)


def refused(node: Node, why: str) -> Problem:
    """The `Problem` A126 for one node that is in the table and asks for what is not built."""
    return Problem(
        "A126",
        f"{node.name} ({node.type}) cannot be read",
        why=why,
        help="export the model without it, or give the PyTorch model itself",
    )
