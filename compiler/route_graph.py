"""A gate on the heads of an attention, in the graph: which of them run for a token.

    scores  [batch, seq, groups]        how much a key/value head is wanted
    on      scores >= the last that is taken of heads that are routed, or the head is shared
    out     [batch, heads, seq, v_dim]  the attention where its head is on, `rest` of it where not

All of it is token by token, so that a decoder is derived as from any other graph. A score is the
norm of the queries of a key/value head, |q_g|, or a linear map of what the queries are made of.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from attnopt.compiler.layout import same_size
from attnopt.compiler.program import Program
from attnopt.compiler.site import Site
from attnopt.compiler.site_weights import token_rows

aten = torch.ops.aten


@dataclass(frozen=True)
class Router:
    """Which key/value heads run for a token: `count` of them, `shared` bool `[groups]` always,
    which are fewer.

    `rest` `[heads, v_dim]` is the result of heads that are off. `weight` `[groups, width]` and
    `bias` `[groups]` score the layer's input; without them the norm of the queries does.
    """

    count: int
    shared: Tensor
    rest: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    def on(self, scores: Tensor) -> Tensor:
        """The heads that run, bool `[tokens, groups]`, by their scores `[tokens, groups]`."""
        wanted = scores.masked_fill(self.shared, float("inf"))
        return wanted >= wanted.topk(self.count, -1).values.amin(-1, keepdim=True)


@dataclass(frozen=True)
class Gate:
    """A gated attention: `join` takes its rows where `on` `[batch, heads, seq, 1]` is true."""

    attention: fx.Node
    join: fx.Node
    on: fx.Node


def gate_of(attention: fx.Node) -> Gate | None:
    """The gate on the heads of an attention, however it came into the graph; None without one."""
    if len(attention.users) != 1:
        return None
    join = next(iter(attention.users))
    if join.target is not aten.where.self or join.args[1] is not attention:
        return None
    on = join.args[0]
    whole = attention.meta["val"].shape
    if not isinstance(on, fx.Node) or on.meta["val"].dim() != 4:
        return None
    wanted = (*whole[:3], 1)
    fits = all(same_size(a, b) for a, b in zip(on.meta["val"].shape, wanted, strict=True))
    return Gate(attention, join, on) if fits else None


def input_of(program: Program, site: Site) -> fx.Node | None:
    """What a site's queries are made of, `[batch, seq, width]` token by token as the queries are;
    None where it has another shape."""
    path = site.q
    if path is None or not program.has(path.source):
        return None
    source = token_rows(program, path)
    shape = source.meta["val"].shape
    batch, _, seq, _ = cast(fx.Node, program.node(site.node).args[0]).meta["val"].shape
    fits = len(shape) == 3 and same_size(shape[0], batch) and same_size(shape[1], seq)
    return source if fits else None


def install(program: Program, site: Site, router: Router) -> None:
    """Put a gate behind a site's attention, in this program's graph."""
    attention = program.node(site.node)
    dtype = attention.meta["val"].dtype
    name = f"route_{site.id.replace('.', '_')}"
    scores = _scores(program, site, router, name)
    routed, always = scores, router.shared
    if bool(always.any()):
        index = program.parameter(f"{name}_routed", (~always).nonzero()[:, 0], before=attention)
        routed = program.call(aten.index_select.default, (scores, -1, index), before=attention)
    free = router.count - int(always.sum())
    best = program.call(aten.topk.default, (routed, free, -1), before=attention)
    best = program.call(operator.getitem, (best, 0), before=attention)
    least = program.call(aten.amin.default, (best, [-1], True), before=attention)
    on = program.call(aten.ge.Tensor, (scores, least), before=attention)
    if routed is not scores:
        held = program.parameter(f"{name}_shared", always, before=attention)
        on = program.call(aten.logical_or.default, (on, held), before=attention)
    on = _by_head(program, on, attention)

    rest = program.parameter(f"{name}_rest", router.rest[:, None].to(dtype), before=attention)
    users = list(attention.users)
    after = attention.next
    join = program.call(aten.where.self, (on, attention, rest), before=after)
    for user in users:
        user.replace_input_with(attention, join)


def _scores(program: Program, site: Site, router: Router, name: str) -> fx.Node:
    """`[batch, seq, groups]`, in float32 at least."""
    attention = program.node(site.node)
    if router.weight is None or router.bias is None:
        return norms(program, attention, len(router.shared))
    source = input_of(program, site)
    assert source is not None
    source = _wide(program, source, attention)
    parameters = [
        program.parameter(f"{name}_{which}", value.to(_dtype(source)), before=attention)
        for which, value in (("weight", router.weight), ("bias", router.bias))
    ]
    return program.call(aten.linear.default, (source, *parameters), before=attention)


def norms(program: Program, attention: fx.Node, groups: int) -> fx.Node:
    """The norm of the queries of each key/value head, `[batch, seq, groups]`."""
    q = cast(fx.Node, attention.args[0])
    heads = int(q.meta["val"].shape[1])
    q = _wide(program, q, attention)
    q = program.call(aten.transpose.int, (q, 1, 2), before=attention)
    axes = [-1]
    if heads > groups:
        sizes = [groups, heads // groups]
        q = program.call(aten.unflatten.int, (q, 2, sizes), before=attention)
        axes = [-2, -1]
    return program.call(aten.linalg_vector_norm.default, (q, 2, axes), before=attention)


def _by_head(program: Program, on: fx.Node, attention: fx.Node) -> fx.Node:
    """`[batch, seq, groups]` as `[batch, heads, seq, 1]`."""
    heads, groups = int(attention.meta["val"].shape[1]), int(on.meta["val"].shape[-1])
    on = program.call(aten.unsqueeze.default, (on, -1), before=attention)
    if heads > groups:
        sizes = [-1, -1, -1, heads // groups]
        on = program.call(aten.expand.default, (on, sizes), before=attention)
        on = program.call(aten.flatten.using_ints, (on, 2), before=attention)
        on = program.call(aten.unsqueeze.default, (on, -1), before=attention)
    return program.call(aten.transpose.int, (on, 1, 2), before=attention)


def _wide(program: Program, node: fx.Node, before: fx.Node) -> fx.Node:
    """In float32 at least: in half precision many heads would be alike."""
    if _dtype(node) in (torch.float32, torch.float64):
        return node
    return program.call(aten.to.dtype, (node, torch.float32), before=before)


def _dtype(node: fx.Node) -> Any:
    return node.meta["val"].dtype
