"""Clone what stands between a projection's heads and the attention for heads with fewer dims.

Rotary embeddings act on pairs of dims, in many spellings (halves, neighbours, complex numbers), and
read tables with one column per dim or per pair. No spelling is known here. Random numbers are put
at the dims that go, zeros at those that stay, and each node is run: the positions of its axes that
stay zero are those that are left of it. Slices and views get bounds and sizes to match, tables are
indexed, and in the end the new operand is compared with the old one at the dims that are left.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from attnopt.compiler.program import Program
from attnopt.compiler.raising.evaluate import Evaluator, Unknown, concrete, example_sizes
from attnopt.compiler.raising.index_probe import small_sizes
from attnopt.compiler.reproject import attempt
from attnopt.compiler.site import Path, Site
from attnopt.compiler.site_weights import VIEWS

aten = torch.ops.aten
_VIEWS = (*VIEWS, aten.expand.default)
_POINTWISE = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
_END = 1 << 62


class DimCut:
    """One operand of a site cut to the dims `kept` (ascending) of its heads.

    `tables` holds indexed tables by name, axis and index, so that operands of one site share them.
    """

    def __init__(
        self, program: Program, site: Site, which: str, kept: Tensor, tables: dict[Any, fx.Node]
    ) -> None:
        path = cast(Path, getattr(site, which))
        self.program, self.kept, self.tables = program, kept, tables
        self.name = f"dims_kept_{site.id.replace('.', '_')}"
        self.split = program.node(path.split)
        self.operand = cast(fx.Node, program.node(site.node).args["qkv".index(which)])
        self.sizes = small_sizes(program)
        known = {**example_sizes(program), **self.sizes}
        meta = self.split.meta["val"]
        self.dtype = meta.dtype
        shape = [concrete(size, known) for size in meta.shape]
        drawn = torch.Generator().manual_seed(0)
        self.x = torch.randn(shape, generator=drawn, dtype=torch.float64)
        gone = self.x.clone()
        gone[..., kept] = 0.0
        self.whole = Evaluator(program, self.sizes, {self.split: self.x.to(self.dtype)})
        self.gone = Evaluator(program, self.sizes, {self.split: gone.to(self.dtype)})
        self._left: dict[fx.Node, dict[int, list[int]]] = {}

    def clone(self, node: fx.Node, values: dict[fx.Node, fx.Node]) -> fx.Node | str:
        """The node on the new values, or why it cannot be."""
        try:
            args = self._args(node, values)
        except Unknown as reason:
            return str(reason)
        kwargs = fx.map_arg(dict(node.kwargs), lambda n: values.get(n, n))
        return attempt(self.program, node, args, kwargs)

    def differs(self, split: fx.Node, operand: fx.Node) -> str:
        """Why the new operand is not the old one at the dims that are left; empty when it is."""
        small = self.x[..., self.kept].to(self.dtype)
        try:
            new = Evaluator(self.program, self.sizes, {split: small})(operand).double()
            old = self.whole(self.operand).double()[..., self.kept]
        except Unknown as reason:
            return str(reason)
        # Norms and rotary tables are often worked out in float32, in a float64 model too.
        eps = max(torch.finfo(self.dtype).eps, torch.finfo(torch.float32).eps)
        if new.shape == old.shape and (new - old).abs().max() <= 64 * eps * old.abs().max():
            return ""
        return "what is done to the heads mixes dims that are left with others"

    def _args(self, node: fx.Node, values: dict[fx.Node, fx.Node]) -> tuple[Any, ...]:
        args: list[Any] = list(fx.map_arg(tuple(node.args), lambda n: values.get(n, n)))
        if node.target is aten.slice.Tensor:
            return self._slice(node, args)
        if node.target in (aten.split.Tensor, aten.select.int):
            return self._part(node, args)
        if node.target in _VIEWS:
            args[1] = self._sized(node, args[1], 0)
        elif node.target is aten.unflatten.int:
            axis = int(args[1]) % cast(fx.Node, node.args[0]).meta["val"].dim()
            args[2] = self._sized(node, args[2], axis)
        elif node.target in _POINTWISE:
            pairs = zip(node.args, args, strict=True)
            return tuple(
                self._table(node, old) if isinstance(old, fx.Node) and old not in values else new
                for old, new in pairs
            )
        return tuple(args)

    def _slice(self, node: fx.Node, args: list[Any]) -> tuple[Any, ...]:
        given = [*args[1:], *(0, 0, _END, 1)[len(args) - 1 :]]
        axis, place = self._axis(node, given[0])
        if place is None:
            return tuple(args)
        size = int(cast(fx.Node, node.args[0]).meta["val"].shape[axis])
        start, end = (None if bound is None else int(bound) for bound in given[1:3])
        wanted = set(range(size)[start : end : int(given[3])])
        if not wanted:
            return tuple(args)  # what does not turn where all dims do
        found = [at for at, old in enumerate(place) if old in wanted]
        if not found:
            raise Unknown(f"nothing is left of `{node.name}`")
        step = found[1] - found[0] if len(found) > 1 else 1
        if found != list(range(found[0], found[-1] + 1, step)):
            raise Unknown(f"what is left of `{node.name}` is not evenly spaced")
        return args[0], axis, found[0], found[-1] + 1, step

    def _part(self, node: fx.Node, args: list[Any]) -> tuple[Any, ...]:
        """A split into equal parts, or one position of an axis."""
        split = node.target is aten.split.Tensor
        axis, place = self._axis(node, (args[2] if len(args) > 2 else 0) if split else args[1])
        if place is None:
            return tuple(args)
        size = int(cast(fx.Node, node.args[0]).meta["val"].shape[axis])
        if not split:
            if int(args[2]) % size not in place:
                raise Unknown(f"nothing is left of `{node.name}`")
            return args[0], axis, place.index(int(args[2]) % size)
        count = size // int(args[1])
        if size % int(args[1]) or len(place) % count:
            raise Unknown(f"`{node.name}` has parts of other sizes")
        return args[0], len(place) // count, axis

    def _axis(self, node: fx.Node, dim: Any) -> tuple[int, list[int] | None]:
        """An axis of a node's input, and the positions that are left of it where some go."""
        source = cast(fx.Node, node.args[0])
        axis = int(dim) % source.meta["val"].dim()
        return axis, self._positions(source).get(axis)

    def _sized(self, node: fx.Node, sizes: Any, first: int) -> list[Any]:
        """The sizes of the axes from `first` on, as they are left."""
        left = self._positions(node)
        return [
            len(left[first + at]) if first + at in left and size != -1 else size
            for at, size in enumerate(sizes)
        ]

    def _table(self, node: fx.Node, table: fx.Node) -> fx.Node:
        """What a node reads besides the heads, at the positions that are left of the node."""
        value, left = table.meta.get("val"), self._positions(node)
        if not isinstance(value, Tensor):
            return table
        rank = node.meta["val"].dim()
        for axis, place in left.items():
            own = axis - rank + value.dim()
            if own < 0 or value.shape[own] == 1:
                continue
            key = (table.name, own, tuple(place))
            if key not in self.tables:
                self.tables[key] = self._indexed(table, own, place)
            table = self.tables[key]
        return table

    def _indexed(self, table: fx.Node, axis: int, place: list[int]) -> fx.Node:
        taken = {name for name, _ in self.program.module.named_buffers(remove_duplicate=False)}
        tried = (f"{self.name}_{i}" for i in range(len(taken) + 1))
        name = next(name for name in tried if name not in taken)
        index = self.program.parameter(name, torch.tensor(place), before=table.next)
        return self.program.call(aten.index_select.default, (table, axis, index), index.next)

    def _positions(self, node: fx.Node) -> dict[int, list[int]]:
        """The axes of a node that lose positions, with those that are left."""
        if node in self._left:
            return self._left[node]
        gone, whole = self.gone(node), self.whole(node)
        found: dict[int, list[int]] = {}
        for axis in range(gone.dim() if isinstance(gone, Tensor) else 0):
            still, always = (_zeros(value, axis) for value in (gone, whole))
            if bool((still & ~always).any()) and not bool(still.all()):
                found[axis] = still.nonzero().flatten().tolist()
        self._left[node] = found
        return found


def _zeros(value: Tensor, axis: int) -> Tensor:
    """At which positions of an axis all is zero."""
    zero: Tensor = (value == 0).movedim(axis, 0).flatten(1).all(1)
    return zero
