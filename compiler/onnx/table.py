"""The table of operators: each is one small function from values to values.

A function takes the node and its inputs (None where one is left out) and returns the outputs, one
alone or a tuple. Importing a module of operators enters its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnopt.compiler.errors import Problem
from attnopt.compiler.onnx.graph import STANDARD, Graph, Node

Operator = Callable[..., Any]
MICROSOFT = "com.microsoft"
FIRST, LAST = 17, 24  # the opsets whose operators these are


@dataclass(frozen=True)
class _Entry:
    function: Operator
    reads: frozenset[str]
    only: Mapping[str, Any] = field(default_factory=dict)


_TABLE: dict[tuple[str, str], _Entry] = {}


def operator(
    *names: str, domain: str = STANDARD, reads: str = "", only: Mapping[str, Any] | None = None
) -> Callable[[Operator], Operator]:
    """Enter a function under one or more operator types of a domain.

    `reads` names the attributes that it takes into account, or that change nothing here; `only`
    gives those that may stand at one value. A node with any other attribute is refused.
    """

    def enter(function: Operator) -> Operator:
        for name in names:
            _TABLE[domain, name] = _Entry(function, frozenset(reads.split()), only or {})
        return function

    return enter


def lookup(node: Node) -> Operator | None:
    """The function of a node, or None."""
    entry = _TABLE.get((node.domain, node.operator))
    return None if entry is None else entry.function


def names() -> list[str]:
    """All operators that can be read, as `Node.type` spells them."""
    return sorted(f"{domain}.{name}" if domain else name for domain, name in _TABLE)


def check_supported(graph: Graph, where: str) -> None:
    """Raise `Problem` A126 that lists every node whose operator is not in the table, or that has an
    attribute which its operator does not read."""
    missing = [node for node in graph.nodes if lookup(node) is None]
    if not missing:
        for node in graph.nodes:
            _check_attributes(node, where)
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


def _check_attributes(node: Node, where: str) -> None:
    entry = _TABLE[node.domain, node.operator]
    for name, value in node.attributes.items():
        if name in entry.reads or (name in entry.only and plain(value) == entry.only[name]):
            continue
        shown = f" of {plain(value)}" if isinstance(value, bytes | int | float) else ""
        problem = refused(node, f"its attribute `{name}`{shown} is not built")
        problem.where = where
        raise problem


def plain(value: Any) -> Any:
    """The value of an attribute, a string as text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


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
