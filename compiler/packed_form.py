"""What a node computes on packed tokens: `Form`, and `Tokenwise`, the forms of a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from attnopt.compiler.layout import Extent, Layout


@dataclass(frozen=True)
class Gather:
    """An operand that is read at the kept tokens.

    `roles` says per axis, counted from the last and with axes of size one put in front where it
    has fewer: "B", "S", "BS" (both in one axis), "" (free) or "1" (dropped: a token axis of size
    one).
    """

    node: fx.Node
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Form:
    """A node on packed tokens: its layout (one per output), and the call; no target means the first
    argument as it is.

    `args` and `kwargs` are those of the call, with the original nodes standing for their packed
    values.
    """

    layout: Layout | tuple[Layout, ...]
    target: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tokenwise:
    """What `analyse` found: forms, layouts (also of `seeds`, padded values that are not computed
    packed), reasons why not."""

    extent: Extent
    padding: fx.Node
    equal: Callable[[Any, Any], bool]
    forms: dict[fx.Node, Form] = field(default_factory=dict)
    layouts: dict[fx.Node, Layout] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)

    def layout(self, value: Any) -> Layout | None:
        """The layout of an argument; None when it has no batch and sequence axes that are known."""
        return self.layouts.get(value) if isinstance(value, fx.Node) else None

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes with layouts that the packed form of a node reads."""
        return [n for n in node.all_input_nodes if n in self.forms or n in self.layouts]


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names of the operator's schema, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    found.update(node.kwargs)
    return found
