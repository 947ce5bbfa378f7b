"""What of a phase only the logits of the last position need is computed of that position alone.

Whatever is no attention and no convolution is computed token by token: a step does so of one. So
what leads to nothing but the logits reads the last position, down to where keys and values need
all: of the last layer, these are what is left of the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.compiler.decode.split import token_axes
from attnopt.compiler.layout import is_symbol, same_size

aten = torch.ops.aten
LAST = "last"  # the mark, in their meta, of nodes that are of the last position alone
LAST_QUERY = "last_query"  # and of attentions that may be given the last query alone
MIXES = "stands_for"  # and of nodes that are not computed token by token: what they replaced


@dataclass(frozen=True)
class Tokens:
    """The nodes of a phase that depend on its tokens; the nodes that count the sequences and the
    tokens of each, and the symbols that these numbers were in the trace."""

    moving: Iterable[fx.Node]
    counts: tuple[fx.Node, fx.Node]
    symbols: tuple[Any, Any]


def of_last(logits: fx.Node, tokens: Tokens) -> fx.Node:
    """The logits `[batch, 1, vocabulary]` of the last position, from those `[batch, S, vocabulary]`
    of all; the graph computes no others."""
    return _Cut(logits, tokens, set(tokens.moving)).write()


@dataclass
class _Cut:
    logits: fx.Node
    tokens: Tokens
    moving: set[fx.Node]
    alone: set[fx.Node] = field(init=False)  # what nothing but the last position's logits need
    cuts: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def write(self) -> fx.Node:
        nodes = list(self.logits.graph.nodes)
        self._find(nodes)
        if self.logits not in self.alone or any(user.op != "output" for user in self.logits.users):
            with self.logits.graph.inserting_after(self.logits):
                return self._slice(self.logits, 1)
        ends = {node for node in nodes if self._ends(node)}
        for node in nodes:
            if node in self.alone or node in ends:
                read = partial(self._read, user=node, ends=ends)
                if node in ends:
                    node.update_arg(0, read(node.args[0]))
                else:
                    node.args, node.kwargs = (fx.map_arg(x, read) for x in (node.args, node.kwargs))
                node.meta[LAST] = True
        return self.logits

    def _find(self, nodes: list[fx.Node]) -> None:
        self.alone = {self.logits}
        for node in reversed(nodes):
            if node in self.moving and _is_tokenwise(node) and self._is_read_alone(node):
                self.alone.add(node)
        while bad := {
            node for node in self.alone if not all(map(self._can_read, node.all_input_nodes))
            or (node is not self.logits and not self._is_read_alone(node))
        }:  # fmt: skip
            self.alone -= bad

    def _is_read_alone(self, node: fx.Node) -> bool:
        return bool(node.users) and all(
            user in self.alone or (self._ends(user) and node not in user.args[1:])  # its query
            for user in node.users
        )

    def _ends(self, node: fx.Node) -> bool:
        """Whether a node is an attention that may be given the last query alone."""
        return (
            LAST_QUERY in node.meta and bool(node.users)
            and all(user in self.alone for user in node.users) and self._can_read(node.args[0])
        )  # fmt: skip

    def _can_read(self, node: Any) -> bool:
        """Whether what it gives for the last position alone can be had."""
        if node in self.alone or node.op == "get_attr" or self._ends(node):
            return True
        moves = node in self.moving
        if self._is_known(node):
            return len(self._axes(node)) in ((1,) if moves else (0, 1))
        return not moves and self._is_count(node)

    def _is_known(self, node: fx.Node) -> bool:
        """Whether a node is a tensor whose axes are sequences, tokens, or of one size."""
        value = node.meta.get("val")
        return isinstance(value, Tensor) and all(
            not is_symbol(size) or any(same_size(size, symbol) for symbol in self.tokens.symbols)
            for size in value.shape
        )

    def _is_count(self, node: fx.Node) -> bool:
        """Whether a node is made of the numbers of sequences and tokens, and of nothing else."""
        if node in self.tokens.counts:
            return True
        given = node.all_input_nodes
        return node.op == "call_function" and bool(given) and all(map(self._is_count, given))

    def _read(self, node: Any, user: fx.Node, ends: set[fx.Node]) -> Any:
        """What a user of the last position reads in the place of a node."""
        if node in self.alone or node in ends or node.op == "get_attr":
            return node
        if node is self.tokens.counts[1]:
            return 1
        if node not in self.cuts:
            with user.graph.inserting_before(user):
                if not self._is_known(node):
                    self.cuts[node] = self._count(node)
                else:
                    axes = self._axes(node)
                    self.cuts[node] = self._slice(node, axes[0]) if axes else node
        return self.cuts[node]

    def _count(self, node: fx.Node) -> Any:
        """What is made of these numbers where there is one token."""
        if node in self.tokens.counts:
            return node if node is self.tokens.counts[0] else 1
        args, kwargs = (fx.map_arg(given, self._count) for given in (node.args, node.kwargs))
        return node.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def _slice(self, node: fx.Node, axis: int) -> fx.Node:
        end = torch.iinfo(torch.int64).max
        made = node.graph.call_function(aten.slice.Tensor, (node, axis, -1, end))
        made.meta = {"val": node.meta["val"], LAST: True}
        return made

    def _axes(self, node: fx.Node) -> list[int]:
        return token_axes(node, self.tokens.symbols[1])


def _is_tokenwise(node: fx.Node) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, (list, tuple)) and value else [value]
    tensors = all(isinstance(part, Tensor) for part in parts)
    return node.op == "call_function" and tensors and MIXES not in node.meta
