"""Choosing the part of a program that runs on packed tokens, and rewriting it so.

The region is every token-wise node that an attention feeds or is fed by. Values leave it only where
a padded position cannot change a result: as an output of the model (a padded position then holds
0), through a cut of fixed positions (these are computed although padded), or behind a product with
the mask or a fill of padded positions with a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Miss
from attnopt.compiler.layout import Layout, is_free
from attnopt.compiler.packed_form import Gather, Tokenwise, arguments
from attnopt.compiler.packed_ops import PACKED_ATTENTION
from attnopt.compiler.program import Program
from attnopt.compiler.spec import parse_spec

aten = torch.ops.aten
COLUMNS = 64  # a cut of more fixed positions than this counts as reading the whole sequence
_CASTS = (
    aten.to.dtype, aten.to.device, aten.to.other, aten.to.dtype_layout, aten._to_copy.default,
    aten.type_as.default, aten.unsqueeze.default, aten.expand.default, aten.expand_as.default,
    aten.clone.default,
)  # fmt: skip


@dataclass(frozen=True)
class Exit:
    """A packed value that others read: `users` read it unpacked, with `fill` at padded
    positions."""

    node: fx.Node
    users: tuple[fx.Node, ...]
    fill: float


@dataclass
class Region:
    """The nodes that run packed, in graph order; where values leave; the padded positions that are
    computed all the same."""

    tokenwise: Tokenwise
    nodes: list[fx.Node]
    exits: list[Exit] = field(default_factory=list)
    columns: tuple[int, ...] = ()
    whole_empty: bool = False


def choose(program: Program, t: Tokenwise) -> Region | Miss:
    """The region to pack, or why there is none."""
    inner = _reach(program.graph, t)
    if not inner:
        reason = next((why for node, why in t.reasons.items() if node in program.attentions()), "")
        return Miss(reason or "no attention with padding is fed by token-wise operators")
    after = _after_attention(program.graph, t)
    while True:
        exits, columns = [], set[int]()
        blocked: tuple[fx.Node, fx.Node] | None = None
        for node in [n for n in program.graph.nodes if n in inner]:
            outside = tuple(u for u in node.users if u not in inner)
            read = [_columns(node, u, t) for u in outside]
            fill = _fill(node, t)
            bad = next(
                (u for u, c in zip(outside, read, strict=True) if c is None and fill is None), None
            )
            if bad is not None:
                blocked = (node, bad)
                break
            columns.update(c for found in read for c in (found or ()) if fill is None)
            if outside:
                exits.append(Exit(node, outside, fill or 0.0))
        if blocked is None:
            break
        node, user = blocked
        if node in after:
            why = t.reasons.get(user, f"`{user.name}` ({user.target}) may read padded positions")
            return Miss(f"padded positions cannot be left out: {why}", at=user.name)
        inner -= ancestors([node])
    region = Region(
        t, [n for n in program.graph.nodes if n in inner], exits, tuple(sorted(columns))
    )
    return _check(region) or region


def polarity(node: Any) -> tuple[Any, bool]:
    """What a mask is made of: `(root, True)` where it is non-zero just where root is, `(root,
    False)` where root is zero."""
    straight = True
    while isinstance(node, fx.Node) and node.op == "call_function":
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
            break
        to, of = node.meta["val"].dtype, source.meta["val"].dtype
        flips = node.target is aten.logical_not.default or (
            node.target is aten.bitwise_not.default and of is torch.bool
        )
        zero = len(node.args) == 2 and node.args[1] == 0
        keeps = node.target in _CASTS and (to is torch.bool or to is of or not of.is_floating_point)
        if flips or (node.target is aten.eq.Scalar and zero):
            straight = not straight
        elif not keeps and not (node.target is aten.ne.Scalar and zero):
            break
        node = source
    return node, straight


def _reach(graph: fx.Graph, t: Tokenwise) -> set[fx.Node]:
    """The token-wise nodes after an attention, and all that feed these or an attention."""
    inner = _after_attention(graph, t)
    inner |= _feeding(inner, t)
    return inner | {
        u for n in inner for u in n.users if u.target is operator.getitem and u in t.forms
    }


def _after_attention(graph: fx.Graph, t: Tokenwise) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        form = t.forms.get(node)
        if form and (form.target is PACKED_ATTENTION or any(n in found for n in t.inputs(node))):
            found.add(node)
    return found


def _feeding(nodes: Iterable[fx.Node], t: Tokenwise) -> set[fx.Node]:
    found, front = set[fx.Node](), list(nodes)
    while front:
        fresh = [n for n in t.inputs(front.pop()) if n in t.forms and n not in found]
        found.update(fresh)
        front += fresh
    return found


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and all that they are computed from."""
    found, front = set(nodes), list(nodes)
    while front:
        fresh = [n for n in front.pop().all_input_nodes if n not in found]
        found.update(fresh)
        front += fresh
    return found


def _columns(node: fx.Node, user: fx.Node, t: Tokenwise) -> tuple[int, ...] | None:
    """The positions whose values `user` needs although they may be padded; None when it may read
    any."""
    if user.op == "output" or user.target is aten.sym_size.int:
        return ()
    layout = t.layouts.get(node)
    if layout is None or user.target not in (aten.select.int, aten.slice.Tensor):
        return None
    a = arguments(user)
    if a["self"] is not node or layout.dims[layout.index(a["dim"])] != ("S",):
        return None
    if user.target is aten.select.int:
        return (a["index"],) if isinstance(a["index"], int) else None
    start, end = a["start"] or 0, a["end"]
    if not isinstance(start, int) or not (end is None or isinstance(end, int)):
        return None
    if start < 0 and (end is None or end > 2**62):
        end = 0
    if end is None or (start < 0) != (end <= 0) or not 0 < end - start <= COLUMNS:
        return None
    return tuple(range(start, end))


def _fill(node: fx.Node, t: Tokenwise) -> float | None:
    """The value that the padded program itself has at every padded position of a node, where that
    is proved."""
    args = t.forms[node].args
    root, straight = polarity(t.padding)
    if node.target is aten.mul.Tensor and any(_mask(x, t) == (root, straight) for x in args):
        return 0.0
    if node.target is aten.masked_fill.Scalar and _mask(args[1], t) == (root, not straight):
        return float(args[2])
    return None


def _mask(operand: Any, t: Tokenwise) -> tuple[Any, bool] | None:
    """The polarity of an operand that comes from outside and has both token axes, batch first."""
    if isinstance(operand, Gather):
        node, roles = operand.node, operand.roles
    elif operand in t.layouts and operand not in t.forms:
        node, roles = operand, entry_roles(t.layouts[operand]) or ()
    else:
        return None
    return polarity(node) if [role for role in roles if role in ("B", "S")] == ["B", "S"] else None


def _check(region: Region) -> Miss | None:
    """What still stands in the way of a chosen region; sets `whole_empty`."""
    t, inner = region.tokenwise, set(region.nodes)
    inside = next((n for n in ancestors([t.padding]) if n in inner), None)
    if inside is not None:
        return Miss("the padding mask is computed from the tokens", at=inside.name)
    for node in region.nodes:
        for source in t.inputs(node):
            layout = t.layouts.get(source)
            if source not in inner and (layout is None or entry_roles(layout) is None):
                return Miss(
                    f"`{source.name}` enters with its tokens folded into other axes", at=source.name
                )
    specs = [
        (n, parse_spec(str(n.args[4])))
        for n in region.nodes
        if t.forms[n].target is PACKED_ATTENTION
    ]
    lowest = [(n, s) for n, s in specs if s.fill == "min"]
    if not region.columns or not lowest:
        return None
    for node, spec in lowest:
        if spec.mask.kind != "full" or "keep" in spec.extras:
            return Miss(
                f"positions {list(region.columns)} are read by the model, and where they are "
                f"padded attention `{node.name}` may average over keys that packing leaves out",
                at=node.name,
            )
    region.whole_empty = True
    return None


def entry_roles(layout: Layout) -> tuple[str, ...] | None:
    roles = []
    for dim in layout.dims:
        if is_free(dim):
            roles.append("")
        elif dim in (("B",), ("S",), ("B", "S")):
            roles.append("".join(str(atom) for atom in dim))
        else:
            return None
    return tuple(roles)
