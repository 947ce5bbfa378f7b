"""What `latent_kv` made of an attention, read off the optimized program as linear maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from attnopt.compiler.checkpoint.changes import Changes, Pair, refusal
from attnopt.compiler.contract import read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Program
from attnopt.compiler.raising.index_probe import CASTS
from attnopt.compiler.raising.projections import Projection, above, projection
from attnopt.compiler.reproject import split_scale
from attnopt.compiler.site import OutputPath, Path
from attnopt.compiler.site_weights import read_output, read_weight

aten = torch.ops.aten


@dataclass(frozen=True)
class Maps:
    """One attention on a latent, float64, as maps of x `[width + 1]`, a constant 1 last.

    `query` `[heads, dim, width + 1]` holds the softmax scale; `down` `[rank, width]` makes the
    latent, `up` `[heads, dim + v_dim, rank + 1]` keys and values of it and of a 1. Complex rotary
    numbers: `query_turn` `[heads, slots, width + 1]` and `key_turn` `[slots, width + 1]`, which
    turn with `frequencies` `[slots]` (radians per position). `out` `[width, heads v_dim]`, `bias`
    `[width]` or None. `weights` are the names of all parameters that these were read from.
    """

    query: Tensor
    down: Tensor
    up: Tensor
    query_turn: Tensor
    key_turn: Tensor
    frequencies: Tensor
    out: Tensor
    bias: Tensor | None
    weights: frozenset[str]

    @property
    def dim(self) -> int:
        """Dims of a head without rotary."""
        return int(self.query.shape[1])

    @property
    def v_dim(self) -> int:
        """Dims of a value."""
        return int(self.up.shape[1]) - self.dim


def has_latents(outcomes: Any) -> bool:
    """Whether a plan with these outcomes gave some attention a latent."""
    return any(o.applied and read_pass(o.rewrite).name == "latent_kv" for o in outcomes)


def read_latents(made: Changes) -> dict[str, Maps]:
    """The maps of every attention, by its module.

    Raises `Problem` A521 for one that has no latent, and for one that is more than such maps.
    """
    found = {pair.before.module: _read(made.program, pair) for pair in made.pairs}
    if len(found) < len(made.pairs):
        raise refusal("one module of the model holds several attentions", help=_ALL)
    return found


def _read(program: Program, pair: Pair) -> Maps:
    _check(program, pair)
    spec = program.spec(pair.after)
    q, k, v = cast(tuple[fx.Node, ...], program.node(pair.after.node).args[:3])
    up_v = _made_by(pair, v)
    latent = projection(up_v.source)
    keys, key_turn = _parts(k)
    queries, query_turn = _parts(q)
    if latent is None or (up_k := _made_by(pair, keys)).source is not up_v.source:
        raise _no(pair, "its keys and values are made of no latent", help=_ALL)
    plain = _made_by(pair, queries)
    out = cast(OutputPath, pair.after.out)
    up = torch.cat((_split(program, up_k, spec.kv_heads), _split(program, up_v, spec.kv_heads)), 1)
    found = [latent, up_k, up_v, plain]
    heads = _queries(program, pair, plain, queries) * spec.scale
    turns = _Turns.none(len(heads), heads.shape[2])
    if key_turn is not None and query_turn is not None:
        sides = _made_by(pair, query_turn), _made_by(pair, key_turn)
        turns = _Turns.read(program, pair, sides, (query_turn, key_turn))
        found += sides
    for item in found[3:]:
        if item.source is not latent.source:
            raise _no(pair, "its queries, keys and values are made of different inputs")
    names = [name for item in found for name in (item.weight, item.bias) if name is not None]
    bias = None if out.bias is None else program.weight(out.bias).detach().double()
    return Maps(
        heads, _rows(program, latent)[:, :-1], up.repeat_interleave(spec.group, 0),
        turns.query * spec.scale, turns.key, turns.frequencies,
        read_output(program, out).flatten(0, 1).T, bias, frozenset(names),
    )  # fmt: skip


_ALL = "give every attention a latent of one kind: latent_kv without targets"


def _check(program: Program, pair: Pair) -> None:
    spec, site = program.spec(pair.after), pair.before
    why = ""
    if spec.softcap:
        why = "it has a soft cap of the logits"
    elif "sinks" in spec.extras or "bias" in spec.extras:
        why = "it has a bias or sinks in its logits"
    elif spec.mask.kind != "causal" and not site.mask.startswith("causal"):
        why = f"it reads other keys ({site.mask}) than a causal attention"
    elif pair.window is not None or spec.mask.kind == "window":
        why = "it has a window"
    elif pair.after.out is None:
        why = f"its output projection is not known: {pair.after.missing.get('out', '')}"
    if why:
        raise _no(pair, why)


def _no(pair: Pair, why: str, help: str = "") -> Problem:
    what = f"{pair.before.id} does not fit a model with latents"
    return refusal(what, where=pair.before.module, why=why, help=help)


def _plain(node: fx.Node) -> fx.Node:
    while node.target in CASTS:
        node = cast(fx.Node, node.args[0])
    return node


def _parts(operand: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The part of keys or queries without rotary, and the part with it, which all heads share."""
    node = _plain(operand)
    joined = cast(Any, node.args[0]) if node.target is aten.cat.default else ()
    if len(joined) != 2:
        return node, None
    plain, turned = (_plain(part) for part in joined)
    if turned.target is aten.expand.default:
        turned = _plain(cast(fx.Node, turned.args[0]))
    return plain, turned


def _made_by(pair: Pair, node: fx.Node) -> Projection:
    found, _ = above(node)
    if len(found) != 1:
        raise _no(pair, f"`{node.name}` is made by {len(found)} projections")
    return found[0]


def _rows(program: Program, made: Projection) -> Tensor:
    """A projection `[out, in + 1]`, the bias last."""
    weight = program.weight(made.weight).detach().double()
    weight = weight if made.layout == "out_in" else weight.T
    bias = weight.new_zeros(len(weight))
    if made.bias is not None:
        bias = program.weight(made.bias).detach().double()
    return torch.cat((weight, bias[:, None]), 1)


def _split(program: Program, made: Projection, heads: int) -> Tensor:
    rows = _rows(program, made)
    return rows.view(heads, -1, rows.shape[1])


def _queries(program: Program, pair: Pair, made: Projection, node: fx.Node) -> Tensor:
    """The queries without rotary, `[heads, dim, width + 1]`, with the number that they are
    multiplied by on their way."""
    _, heads, _, dim = node.meta["val"].shape
    old = pair.before.q
    channels = torch.arange(heads * dim).view(heads, dim)
    if old is not None and made.node.name == old.projection:
        channels = old.channels
    path = Path(
        made.node.name, made.source.name, made.weight, made.bias, made.layout, channels, node.name,
        "bhtd",
    )  # fmt: skip
    factor = split_scale(program, path)
    if factor is None:
        raise _no(pair, "between the queries and their heads stands a norm")
    weight, bias = read_weight(program, path)
    last = torch.zeros_like(weight[..., :1]) if bias is None else bias[..., None]
    return torch.cat((weight, last), 2) * factor


@dataclass(frozen=True)
class _Turns:
    """Rotary numbers, see `Maps`."""

    query: Tensor
    key: Tensor
    frequencies: Tensor

    @staticmethod
    def none(heads: int, width: int) -> _Turns:
        """No slots."""
        empty = torch.zeros(heads, 0, width, dtype=torch.complex128)
        return _Turns(empty, empty[0], torch.zeros(0, dtype=torch.float64))

    @staticmethod
    def read(
        program: Program, pair: Pair, made: tuple[Projection, ...], nodes: tuple[fx.Node, ...]
    ) -> _Turns:
        """From the projections of the two sides, and the nodes whose last axis holds the chosen
        dims."""
        rotary = pair.before.rotary
        if rotary is None or rotary.axes != 1:
            raise _no(pair, "its rotary embedding is not one of positions in a sequence")
        sides, spots = [], []
        for item, node, heads in zip(made, nodes, (program.spec(pair.after).heads, 1), strict=True):
            rows = _split(program, item, heads)
            picked = torch.arange(rows.shape[1])
            if node.target is aten.index_select.default:
                picked = program.weight(str(cast(fx.Node, node.args[2]).target)).long()
            sides.append(rows[:, picked])
            spots.append(picked)
        dim = pair.before.spec.head_dim
        place = {int(spot): at for at, spot in enumerate(spots[1])}
        slots = [
            (at, place.get(turn - turn % dim + int(b), -1), p)
            for turn, at in place.items()
            for p, (a, b) in enumerate(rotary.pairs)
            if turn % dim == int(a)
        ]
        if not slots or any(partner < 0 for _, partner, _ in slots):
            raise _no(pair, "its dims were cut before it was given a latent")
        first, second, pairs = torch.tensor(slots).T
        query, key = (torch.complex(side[:, first], side[:, second]) for side in sides)
        gain = pair.after.gain * rotary.gain**2
        return _Turns(query * gain, key[0], rotary.frequencies[pairs].double())
