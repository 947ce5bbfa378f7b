"""Work out a relative position bias once per distance, instead of once per query and key.

A bias that depends on j - i alone (T5's buckets: Raffel et al. 2020, arXiv:1910.10683, section 2.1)
is a Toeplitz matrix: S queries and S keys have 2S - 1 distances. Where the graph makes it of
arange(S)[None, :] - arange(S)[:, None] by operators that work element by element, these are run on
the distances -(S - 1), ..., S - 1, and each query reads its part of the result. The same numbers
come out, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass
from attnopt.compiler.layout import same_size
from attnopt.compiler.packing import ancestors
from attnopt.compiler.program import Program
from attnopt.compiler.site import Site

aten = torch.ops.aten
_LIKE = (aten.full_like.default, aten.zeros_like.default, aten.ones_like.default)
_SAME = (
    aten.to.dtype, aten.to.other, aten.to.dtype_layout, aten.to.device, aten._to_copy.default,
    aten.type_as.default, aten.clone.default, aten.contiguous.default, *_LIKE,
)  # fmt: skip
_MOVES = (aten.unsqueeze.default, aten.reshape.default, aten.view.default)


@dataclass(frozen=True)
class _Distance:
    """The node `[S, S]` of all distances, and the node 0, ..., S - 1 that it is made of; `forward`
    says that it is key minus query."""

    node: fx.Node
    count: fx.Node
    forward: bool

    @property
    def length(self) -> Any:
        """S: a number, or the node of it."""
        return self.count.args[-1]


@dataclass(frozen=True)
class ToeplitzBias(Pass):
    """Evaluate a bias of distances at each distance once."""

    name: ClassVar[str] = "toeplitz_bias"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    source: ClassVar[str] = "Raffel et al. 2020, T5, arXiv:1910.10683"
    after: ClassVar[tuple[str, ...]] = ("simplify_mask",)

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """Rewrite the bias of an attention, for all that read it, or say why not."""
        node = program.node(target.node)
        spec = program.spec(target)
        if "bias" not in spec.extras:
            return Miss("it has no bias", at=target.node)
        bias = cast(list[fx.Node], node.args[3])[spec.extras.index("bias")]
        if any(n.target is aten.as_strided.default for n in ancestors([bias])):
            return Miss("it reads a bias that was rewritten at another attention", at=bias.name)
        found = _distance(bias)
        if found is None:
            return Miss("its bias is not made of arange(S) - arange(S)", at=bias.name)
        region = _region(found, bias)
        if isinstance(region, Miss):
            return region

        def edit(copy: Program) -> None:
            _write(copy, found, [n.name for n in region], bias.name)

        return Edit(graph=edit, note="its bias is worked out once per distance")


def _distance(bias: fx.Node) -> _Distance | None:
    """The one node of distances that a bias is made of."""
    found = [made for node in ancestors([bias]) if (made := _as_distance(node)) is not None]
    return found[0] if len(found) == 1 else None


def _as_distance(node: fx.Node) -> _Distance | None:
    if node.target not in (aten.sub.Tensor, aten.subtract.Tensor):
        return None
    if node.kwargs.get("alpha", 1) != 1:
        return None
    a, b = node.args[:2]
    value = node.meta.get("val")
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or value is None:
        return None
    if value.dim() != 2 or not same_size(*value.shape):
        return None
    first, second = _counts(a), _counts(b)
    if first is None or second is None or {first[1], second[1]} != {0, 1}:
        return None
    return _Distance(node, first[0], forward=first[1] == 1)


def _counts(node: fx.Node) -> tuple[fx.Node, int] | None:
    """For 0, 1, 2, ... along one axis of `[S, 1]` or `[1, S]`: the node `[S]` and the axis."""
    shape = node.meta["val"].shape
    if len(shape) != 2 or sum(size == 1 for size in shape) != 1:
        return None
    axis = 0 if shape[1] == 1 else 1
    while node.target in (*_MOVES, aten.add.Tensor, aten.to.dtype, aten._to_copy.default):
        if node.target is aten.add.Tensor and node.args[1] != 0:
            return None
        if node.meta["val"].dtype not in (torch.int32, torch.int64):
            return None  # a narrower one may wrap
        node = cast(fx.Node, node.args[0])
    from_zero = node.target is aten.arange.start and node.args[0] == 0
    return (node, axis) if from_zero or node.target is aten.arange.default else None


def _region(found: _Distance, bias: fx.Node) -> list[fx.Node] | Miss:
    """The nodes from the distances to the bias, in order, with queries and keys on the bias' last
    two axes."""
    axes = {found.node: (0, 1)}
    feeds = ancestors([bias])
    region = list[fx.Node]()
    for node in bias.graph.nodes:
        if node not in feeds or not any(n in axes for n in node.all_input_nodes):
            continue
        made = _axes(node, axes)
        if made is None:
            return Miss(
                f"`{node.target}` is not known to work on each distance alone", at=node.name
            )
        axes[node] = made
        region.append(node)
    shape = bias.meta["val"].shape
    rank = len(shape)
    if any(not isinstance(size, int) for size in shape[:-2]):
        return Miss("its bias differs between sequences", at=bias.name)
    if axes.get(bias) != (rank - 2, rank - 1):
        return Miss("queries and keys are not the last two axes of its bias", at=bias.name)
    return region


def _axes(node: fx.Node, axes: dict[fx.Node, tuple[int, int]]) -> tuple[int, int] | None:
    """The axes of queries and keys after an operator; None where it may mix distances."""
    inside = [n for n in node.all_input_nodes if n in axes]
    others = [n for n in node.all_input_nodes if n not in axes]
    (i, j), of = axes[inside[0]], inside[0].meta["val"]
    if node.target is aten.embedding.default:
        return (i, j) if inside == [node.args[1]] else None
    if node.target is aten.permute.default and not others:
        order = [int(dim) % of.dim() for dim in cast(list[int], node.args[1])]
        return order.index(i), order.index(j)
    if node.target is aten.transpose.int and not others:
        a, b = (int(cast(int, dim)) % of.dim() for dim in node.args[1:3])
        swap = {a: b, b: a}
        return swap.get(i, i), swap.get(j, j)
    if node.target is aten.unsqueeze.default:
        at = int(cast(int, node.args[1])) % (of.dim() + 1)
        return i + (at <= i), j + (at <= j)
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        return (i, j) if not any(cast(list[int], node.args[1])) else None
    if node.target not in _SAME and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return None
    made = node.meta["val"]
    if any(axes[n] != (i, j) or n.meta["val"].dim() != made.dim() for n in inside):
        return None
    return (i, j) if all(_constant_along(n, made.dim(), (i, j)) for n in others) else None


def _constant_along(node: fx.Node, rank: int, axes: tuple[int, int]) -> bool:
    """Whether an operand is the same for all queries and keys."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return False
    missing = rank - value.dim()
    return all(axis < missing or value.shape[axis - missing] == 1 for axis in axes)


def _write(program: Program, found: _Distance, region: list[str], bias: str) -> None:
    here = {node.name: node for node in program.graph.nodes}
    call, distance, old = program.call, here[found.node.name], here[bias]
    count = here[found.count.name]  # 0, ..., S - 1
    ahead = call(aten.slice.Tensor, (count, 0, 1), before=distance)
    behind = call(aten.neg.default, (call(aten.flip.default, (ahead, [0]), before=distance),),
                  before=distance)  # fmt: skip
    every = call(aten.cat.default, ([behind, count],), before=distance)
    if not found.forward:
        every = call(aten.neg.default, (every,), before=distance)
    every = call(aten.to.dtype, (every, distance.meta["val"].dtype), before=distance)
    made = {distance: call(aten.unsqueeze.default, (every, 0), before=distance)}
    for name in region:
        node = here[name]
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: made.get(n, n))
        made[node] = call(node.target, args, node, **kwargs)
    # Row i of the matrix is the part of S numbers that ends S - 1 - i before the last one.
    leading = [int(size) for size in old.meta["val"].shape[:-2]]
    rows = math.prod(leading)
    flat = call(aten.reshape.default, (made[old], [rows, -1]), before=old)
    flat = call(aten.contiguous.default, (flat,), before=old)
    width = call(aten.sym_size.int, (flat, 1), before=old)
    length = here[found.length.name] if isinstance(found.length, fx.Node) else found.length
    view = (flat, [rows, length, length], [width, 1, 1])
    parts = call(aten.as_strided.default, view, before=old)
    whole = call(aten.flip.default, (parts, [1]), before=old)
    if leading:
        shaped = call(aten.unflatten.int, (whole, 0, leading), before=old)
    else:
        shaped = call(aten.select.int, (whole, 0, 0), before=old)
    old.replace_all_uses_with(shaped)
