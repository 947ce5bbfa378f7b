"""Rewriting the chosen region of a program so that it runs on packed tokens."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from attnopt.compiler.layout import Layout, is_symbol, same_size
from attnopt.compiler.packed_form import Form, Gather, arguments
from attnopt.compiler.packed_ops import PACK_INDEX, PACKED_ATTENTION, UNPACK
from attnopt.compiler.packing import Exit, Region, ancestors, entry_roles
from attnopt.compiler.program import Program, infer

aten = torch.ops.aten


def rewrite(program: Program, region: Region) -> None:
    """Run the region of `program` (a copy of the one that was analysed) on packed tokens.

    In place; `clean` is left to do.
    """
    _Writer(program, region).write()


def placeholder_dim(graph: fx.Graph, size: Any) -> tuple[fx.Node, int] | None:
    """An input and the dimension of it that has a size."""
    for node in graph.nodes:
        shape = getattr(node.meta.get("val"), "shape", ()) if node.op == "placeholder" else ()
        for dim, found in enumerate(shape):
            if same_size(found, size):
                return node, dim
    return None


class _Writer:
    """Rewrites the region's nodes in place; values that enter are gathered, values that leave are
    unpacked."""

    def __init__(self, program: Program, region: Region) -> None:
        self.program, self.region, self.t = program, region, region.tokenwise
        self.here: dict[str, fx.Node] = {node.name: node for node in program.graph.nodes}
        self.now: dict[fx.Node, fx.Node] = {}
        self.made: dict[Any, Any] = {}

    def write(self) -> None:
        first = self.here[self.region.nodes[0].name]
        self.batch, self.seq = (
            self._size(x, first) for x in (self.t.extent.batch, self.t.extent.seq)
        )
        padding = self._hoisted(self.t.padding, first)
        for dim, (size, cut) in enumerate(
            ((self.t.extent.batch, self.batch), (self.t.extent.seq, self.seq))
        ):
            if not same_size(padding.meta["val"].shape[dim], size):
                padding = self.program.call(aten.slice.Tensor, (padding, dim, 0, cut), before=first)
        packed = self.program.call(
            PACK_INDEX, (padding, list(self.region.columns), self.region.whole_empty), before=first
        )
        self.index, self.offsets, self.keys = (
            self.program.call(operator.getitem, (packed, i), before=first) for i in range(3)
        )
        for node in self.region.nodes:
            self.now[node] = self._pack(node, self.t.forms[node])
        for leaving in self.region.exits:
            self._leave(leaving)

    def _size(self, size: Any, before: fx.Node) -> Any:
        if not is_symbol(size):
            return int(size)
        found = placeholder_dim(self.program.graph, size)
        assert found is not None
        return self.program.call(aten.sym_size.int, found, before=before)

    def _hoisted(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The copy's node, moved with all that it needs to stand before another."""
        needed = {self.here[n.name] for n in ancestors([node])}
        late, seen = [], False
        for other in self.program.graph.nodes:
            seen = seen or other is before
            if seen and other in needed:
                late.append(other)
        for other in late:
            before.prepend(other)
        return self.here[node.name]

    def _pack(self, node: fx.Node, form: Form) -> fx.Node:
        target = self.here[node.name]
        args, kwargs = self._arguments(form.args, target), self._arguments(form.kwargs, target)
        if form.target is None:
            return cast(fx.Node, args[0])
        if form.target is PACKED_ATTENTION:
            args = (*args, self.index, self.offsets, self.keys, self.seq)
        target.target, target.args, target.kwargs = form.target, args, kwargs
        infer(target)
        return target

    def _arguments(self, value: Any, before: fx.Node) -> Any:
        if isinstance(value, Gather):
            return self._gather(self.here[value.node.name], value.roles, before)
        if isinstance(value, fx.Node):
            if value in self.now:
                return self.now[value]
            layout = self.t.layouts.get(value)
            roles = entry_roles(layout) if layout else None
            return (
                self._gather(self.here[value.name], roles, before)
                if roles
                else self.here[value.name]
            )
        if isinstance(value, dict):
            return {key: self._arguments(item, before) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            made = [self._arguments(item, before) for item in value]
            return tuple(made) if isinstance(value, tuple) else made
        return value

    def _gather(self, node: fx.Node, roles: tuple[str, ...], before: fx.Node) -> fx.Node:
        """The operand at the kept tokens: token axes moved to the front, then one index_select."""
        if (node, roles) in self.made:
            return cast(fx.Node, self.made[node, roles])
        call, x = self.program.call, node
        for _ in range(len(roles) - len(x.meta["val"].shape)):
            x = call(aten.unsqueeze.default, (x, 0), before=before)
        for dim in reversed([i for i, role in enumerate(roles) if role == "1"]):
            x = call(aten.select.int, (x, dim, 0), before=before)
        left = [role for role in roles if role != "1"]
        order = sorted(range(len(left)), key=lambda i: (not left[i], left[i], i))
        if order != list(range(len(left))):
            x = call(aten.permute.default, (x, order), before=before)
        tokens = "".join(sorted(role for role in left if role))
        if tokens == "BS" and "BS" not in left:
            free = [int(s) for s in x.meta["val"].shape[2:]]
            x = call(aten.reshape.default, (x, [-1, *free]), before=before)
        if tokens:
            x = call(
                aten.index_select.default, (x, 0, self._positions(tokens, before)), before=before
            )
        self.made[node, roles] = x
        return x

    def _positions(self, tokens: str, before: fx.Node) -> fx.Node:
        """The kept tokens' index into the flat batch ("BS"), their column ("S") or their row
        ("B")."""
        if tokens == "BS":
            return self.index
        if tokens not in self.made:
            divide = aten.remainder.Scalar if tokens == "S" else aten.floor_divide.default
            self.made[tokens] = self.program.call(divide, (self.index, self.seq), before=before)
        return cast(fx.Node, self.made[tokens])

    def _leave(self, leaving: Exit) -> None:
        layout = self.t.layouts[leaving.node]
        original = self.here[leaving.node.name]
        unpacked: fx.Node | None = None
        for user in (self.here[u.name] for u in leaving.users):
            if user.target is aten.sym_size.int:
                self._replace_size(user, layout)
                continue
            unpacked = unpacked or self._unpacked(self.now[leaving.node], layout, leaving.fill)
            user.replace_input_with(original, unpacked)

    def _unpacked(self, node: fx.Node, layout: Layout, fill: float) -> fx.Node:
        key = (node, layout, fill)
        if key not in self.made:
            before, call = node.next, self.program.call
            x = call(UNPACK, (node, self.index, self.batch, self.seq, fill), before=before)
            atoms = [atom for dim in layout.dims for atom in dim]
            free = iter(range(2, 2 + len(layout.free)))
            order = [{"B": 0, "S": 1}[a] if isinstance(a, str) else next(free) for a in atoms]
            if order != list(range(len(order))):
                x = call(aten.permute.default, (x, order), before=before)
            if len(atoms) != len(layout.dims):
                sizes: dict[Any, Any] = {"B": self.batch, "S": self.seq}
                shape = [-1 if len(d) > 1 else sizes.get(d[0], d[0]) for d in layout.dims]
                x = call(aten.reshape.default, (x, shape), before=before)
            self.made[key] = x
        return cast(fx.Node, self.made[key])

    def _replace_size(self, node: fx.Node, layout: Layout) -> None:
        """A size that was read off a packed value, from the inputs instead."""
        sizes: dict[Any, Any] = {"B": self.batch, "S": self.seq}
        factors = [sizes.get(a, a) for a in layout.dims[layout.index(arguments(node)["dim"])]]
        size: Any = factors[0]
        for factor in factors[1:]:
            inside = isinstance(size, fx.Node) or isinstance(factor, fx.Node)
            made = self.program.call(operator.mul, (size, factor), before=node) if inside else None
            size = made or size * factor
        if isinstance(size, fx.Node):
            node.replace_all_uses_with(size)
            return
        for user in list(node.users):
            user.args = fx.map_arg(user.args, lambda n: size if n is node else n)
            user.kwargs = fx.map_arg(user.kwargs, lambda n: size if n is node else n)
