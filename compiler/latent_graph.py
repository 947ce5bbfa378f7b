"""Keys and values of one latent, in the graph of a site.

    c = linear(x, down)                       [batch, seq, rank]
    k = [linear(c, up_k) | shared rotary]     [batch, kv_heads, seq, dim + rotary]
    q = [q before rotary | its rotary part]   [batch, heads, seq, dim + rotary]
    v = linear(c, up_v)                       [batch, kv_heads, seq, v_dim]

The rotary parts go the way that the model's own keys and queries go, as heads of which only the
wanted dims are read, so that every spelling of rotary is its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Miss
from attnopt.compiler.latent import Latent, Slots
from attnopt.compiler.layout import same_size
from attnopt.compiler.program import Program, infer
from attnopt.compiler.reproject import Which, projected, rebuilt, split_scale
from attnopt.compiler.site import Path, Rotary, Site
from attnopt.compiler.site_heads import Heads

aten = torch.ops.aten


def install(program: Program, site: Site, heads: Heads, slots: Slots, made: Latent) -> Site | Miss:
    """Put the maps into a program's graph.

    Answers the site with its new facts, or what stood in the way; the program is then half edited.
    """
    attention, k_path = program.node(site.node), cast(Path, site.k)
    down = projected(program, k_path, made.down, None, 1, "latent_down")
    if isinstance(down, Miss):
        return down
    c, split = down
    sequence = 1 if k_path.order == "bthd" else 2
    if not same_size(c.meta["val"].shape[1], split.meta["val"].shape[sequence]):
        return Miss("the sequence comes before the batch", k_path.source)
    factor = split_scale(program, cast(Path, site.q))
    if factor is None:
        return Miss("between the queries and their heads stands a norm", cast(Path, site.q).split)
    gain = (_gains(site, heads.k.shape[1]) / factor)[:, None]  # the split queries have it already
    # A bias of keys without rotary is the same in all logits of a query, which softmax does not
    # see; a soft cap and sinks do.
    seen = site.spec.softcap != 0.0 or "sinks" in site.spec.extras
    k_bias = (gain[:, 0] * made.k_bias).flatten() if seen else None
    v_bias = made.v_bias.flatten() if bool(made.v_bias.any()) else None
    _, k = _expanded(program, site, c, "up_k", gain * made.up_k, k_bias)
    linear, v = _expanded(program, site, c, "up_v", made.up_v, v_bias)
    q_path = cast(Path, site.q)
    q = program.node(q_path.split)
    if q_path.order == "bthd":
        q = program.call(aten.transpose.int, (q, 1, 2), before=attention)
    if len(slots.pair):
        parts = _rotary(program, site, heads, slots)
        if isinstance(parts, Miss):
            return parts
        shared = program.call(
            aten.expand.default, (parts[1], [-1, len(heads.k), -1, -1]), before=attention
        )
        q = _joined(program, attention, q, parts[0])
        k = _joined(program, attention, k, shared)
    for at, operand in enumerate((q, k, v)):
        dtype = cast(fx.Node, attention.args[at]).meta["val"].dtype
        if operand.meta["val"].dtype != dtype:
            operand = program.call(aten.to.dtype, (operand, dtype), before=attention)
        attention.update_arg(at, operand)
    spec = program.spec(site).with_(
        kv_heads=len(heads.k), head_dim=int(q.meta["val"].shape[3]), v_dim=heads.v.shape[1]
    )
    attention.update_arg(4, spec.text)
    infer(attention)
    program.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    for path in (cast(Path, p) for p in (site.q, site.k, site.v)):
        for name in filter(None, (path.weight, path.bias)):
            program.drop_weight(name)
    return _facts(site, program, linear, v, heads)


def _gains(site: Site, dim: int) -> Tensor:
    """The factors that queries and keys carry on their way, by dim of a head, float64."""
    made = torch.full((dim,), site.gain, dtype=torch.float64)
    if site.rotary is not None:
        made[site.rotary.pairs.reshape(-1)] *= site.rotary.gain**2
    return made


def _expanded(
    program: Program, site: Site, c: fx.Node, name: str, up: Tensor, bias: Tensor | None
) -> tuple[fx.Node, fx.Node]:
    """`up` `[kv_heads, dim, rank]` of the latent: the projection, and `[batch, kv_heads, seq,
    dim]`."""
    attention = program.node(site.node)
    dtype = c.meta["val"].dtype
    weight = str(c.args[1].target).replace("latent_down", f"latent_{name}")  # type: ignore[union-attr]
    parameters = [program.parameter(weight, up.flatten(0, 1).to(dtype), before=attention)]
    if bias is not None:
        owner = weight.removesuffix("_weight")
        parameters.append(program.parameter(f"{owner}_bias", bias.to(dtype), before=attention))
    linear = program.call(aten.linear.default, (c, *parameters), before=attention)
    made = program.call(aten.unflatten.int, (linear, -1, list(up.shape[:2])), before=attention)
    return linear, program.call(aten.transpose.int, (made, 1, 2), before=attention)


def _rotary(
    program: Program, site: Site, heads: Heads, slots: Slots
) -> tuple[fx.Node, fx.Node] | Miss:
    """The rotary parts of queries `[batch, heads, seq, rotary]` and of keys `[batch, 1, seq,
    rotary]`."""
    dim, groups = heads.k.shape[1], len(heads.k)
    # The n-th slot of a frequency lies in the n-th of some heads that go through rotary.
    turn = torch.tensor([int((slots.pair[:at] == p).sum()) for at, p in enumerate(slots.pair)])
    count = int(turn.max()) + 1
    width = heads.k.shape[2]
    key = torch.zeros(count, dim, width, dtype=torch.float64)
    query = torch.zeros(len(heads.q), count, dim, width, dtype=torch.float64)
    pairs = cast(Rotary, site.rotary).pairs
    a, b = pairs[slots.pair].T
    numbers = torch.complex(heads.q[:, pairs[:, 0]], heads.q[:, pairs[:, 1]])
    factors = slots.factors.repeat_interleave(len(heads.q) // groups, 1)
    wanted = torch.einsum("shp,hpw->hsw", factors.conj(), numbers)
    key[turn, a], key[turn, b] = slots.key.real, slots.key.imag
    query[:, turn, a], query[:, turn, b] = wanted.real, wanted.imag
    dims = torch.cat((turn * dim + a, turn * dim + b)).sort().values
    made = []
    parts: tuple[tuple[Which, Tensor], ...] = (("q", query.flatten(0, 1)), ("k", key))
    for which, weight in parts:
        flat = weight.flatten(0, 1)
        bias = flat[:, -1] if bool(flat[:, -1].any()) else None
        part = rebuilt(
            program,
            site,
            which,
            flat[:, :-1],
            bias,
            len(weight),
            name="latent_rotary",
        )
        if isinstance(part, Miss):
            return part
        made.append(_picked(program, site, part[0], count, dims))
    return made[0], made[1]


def _picked(program: Program, site: Site, operand: fx.Node, count: int, dims: Tensor) -> fx.Node:
    """Of `[batch, heads * count, seq, dim]` the `dims` of each head's `count * dim`, `[batch,
    heads, seq, dims]`."""
    attention = program.node(site.node)
    _, many, _, dim = operand.meta["val"].shape
    if count > 1:
        sizes = [int(many) // count, count]
        operand = program.call(aten.unflatten.int, (operand, 1, sizes), before=attention)
        operand = program.call(aten.transpose.int, (operand, 2, 3), before=attention)
        operand = program.call(aten.flatten.using_ints, (operand, 3), before=attention)
    if len(dims) == count * int(dim):
        return operand
    name = f"{site.node}_rotary_dims"
    index = program.parameter(name, dims, before=attention)
    return program.call(aten.index_select.default, (operand, -1, index), before=attention)


def _joined(program: Program, attention: fx.Node, plain: fx.Node, rotary: fx.Node) -> fx.Node:
    dtype = rotary.meta["val"].dtype
    if plain.meta["val"].dtype != dtype:
        plain = program.call(aten.to.dtype, (plain, dtype), before=attention)
    return program.call(aten.cat.default, ([plain, rotary], -1), before=attention)


def _facts(site: Site, program: Program, linear: fx.Node, v: fx.Node, heads: Heads) -> Site:
    groups, dim = heads.v.shape[:2]
    args = cast(tuple[fx.Node, ...], linear.args)
    split = cast(fx.Node, v.args[0])
    path = Path(
        linear.name, args[0].name, str(args[1].target),
        str(args[2].target) if len(args) > 2 else None, "out_in",
        torch.arange(groups * dim).view(groups, dim), split.name, "bthd",
    )  # fmt: skip
    why = "it is made of a latent and of what all heads share"
    missing = {**site.missing, "k": why}
    q = site.q
    if site.rotary is not None:
        q, missing["q"] = None, "a part of it has rotary, a part has not"
    return replace(
        site, spec=program.spec(site), kv_heads=groups, q=q, k=None, v=path, rotary=None,
        missing=missing,
    )  # fmt: skip
