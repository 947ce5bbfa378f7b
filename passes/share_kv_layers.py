"""Neighbouring layers share the keys and values of the first of them, and with them its cache.

In runs of `span` attentions the later ones read the keys and values of the first (the idea of
YOCO, Sun et al. 2024, and of cross-layer attention, Brandon et al. 2024, which train such models).
Here each later attention keeps its queries and its output: with k_m, v_m its own heads and k'_m,
v'_m the shared ones, the least squares maps k_m ~ T_m k'_m and v_m ~ M_m v'_m are absorbed in them,
T_m as far as it commutes with the queries' rotary and norm. Which head stands for which is the
assignment that explains most energy. Much is lost: heal it, or look at the figures first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import networkx as nx
import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, choice
from attnopt.compiler.gauge import Freedom, complex_scalars, freedom, unpaired
from attnopt.compiler.grams import real
from attnopt.compiler.head_groups import fixed_order
from attnopt.compiler.layout import same_size
from attnopt.compiler.program import Batch, Program, peek
from attnopt.compiler.regions import Part
from attnopt.compiler.site import Path, Site
from attnopt.compiler.site_heads import Heads, unknown
from attnopt.compiler.site_weights import write_output, write_query

_DAMPING = 1e-12  # of the mean energy of a dim, for shared heads that span fewer


@dataclass(frozen=True)
class ShareKvLayers(Pass):
    """One cache for every `span` neighbouring attentions."""

    name: ClassVar[str] = "share_kv_layers"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    source: ClassVar[str] = "YOCO (Sun et al. 2024); cross-layer attention (Brandon et al. 2024)"

    after: ClassVar[tuple[str, ...]] = ("fuse_attention", "merge_kv_heads")
    removes: ClassVar[tuple[Part, ...]] = ("k", "v")

    span: int = choice(2, 3, 4, default=2)

    @classmethod
    def caching(cls, program: Program, share: float) -> tuple[Pass, ...]:
        """The shortest runs that leave few enough caches."""
        sites = len(program.sites)
        for span in range(2, sites + 1):
            if -(-sites // span) <= share * sites:
                return (cls(span=span),)
        return ()

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """New queries and a new output for an attention that reads another's keys, or why not."""
        ids = [site.id for site in program.sites if program.has(site.node)]
        if target.id not in ids:
            return Miss("an earlier rewrite took this attention away", target.node)
        place = ids.index(target.id) % self.span if self.span > 1 else 0
        if not place:
            return Miss("the first of its run keeps its own keys and values", target.node)
        first = program.site(ids[ids.index(target.id) - place])
        for miss in (_unlike(program, first, target), unknown(program, target)):
            if miss is not None:
                return miss
        if not notes.calibration:
            return Miss(
                "which keys stand for which needs calibration data", target.node,
                help="give --text FILE",
            )  # fmt: skip
        free = freedom(program, target, "q")
        fitted = _Fit.of(program, first, target, free, notes.calibration)
        queries = Heads.read(program, target).of_queries(fitted.order)
        if fixed_order(program, target, queries, fitted.order) is not None:
            fitted = _Fit.of(program, first, target, free, notes.calibration, fixed=True)
        facts = _install(program.copy(), first, target, fitted)

        def edit(copy: Program) -> None:
            _install(copy, first, target, fitted)

        evidence = fitted.lost(program, first, target, notes.calibration, "residual")
        if notes.heldout:
            evidence |= fitted.lost(program, first, target, notes.heldout, "heldout")
        said = f"reads the keys and values of {first.module or first.id}"
        return Edit(graph=edit, sites={target.id: facts}, note=said, evidence=evidence)


def _unlike(program: Program, first: Site, target: Site) -> Miss | None:
    """Why an attention cannot read another's keys and values."""
    mine, theirs = program.spec(target), program.spec(first)
    for site in (target, first):
        if program.spec(site).kv_heads != site.kv_heads:
            return Miss("its key/value heads are repeated", site.node, help="fold_repeated_kv")
    for name in ("heads", "kv_heads", "head_dim", "v_dim", "mask"):
        if getattr(mine, name) != getattr(theirs, name):
            return Miss(f"the attentions differ in {name}", target.node)
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    if order[program.node(first.node)] > order[program.node(target.node)]:
        return Miss("the other attention comes later", first.node)
    if (first.rotary is None) != (target.rotary is None):
        return Miss("only one of the attentions has rotary", target.node)
    if first.rotary is not None and target.rotary is not None:
        alike = (
            torch.equal(first.rotary.pairs, target.rotary.pairs)
            and torch.allclose(first.rotary.frequencies, target.rotary.frequencies)
            and first.rotary.gain == target.rotary.gain
        )
        if not alike:
            return Miss("the attentions turn by other angles", target.node)
    for ours, other in zip(_operands(program, target), _operands(program, first), strict=True):
        pairs = zip(ours.meta["val"].shape, other.meta["val"].shape, strict=True)
        if ours.meta["val"].dtype != other.meta["val"].dtype or not all(
            same_size(a, b) for a, b in pairs
        ):
            return Miss("the keys are of other sequences", other.name)
    return None


def _operands(program: Program, site: Site) -> tuple[fx.Node, fx.Node]:
    _, k, v, *_ = cast(tuple[fx.Node, ...], program.node(site.node).args)
    return k, v


@dataclass(frozen=True)
class _Fit:
    """`order[m]` is the head of the target that reads shared head m; `keys` `[kv_heads, d, d]` and
    `values` `[kv_heads, dv, dv]` map shared head m to what it stands for."""

    order: Tensor
    keys: Tensor
    values: Tensor

    @staticmethod
    def of(
        program: Program, first: Site, target: Site, free: Freedom,
        batches: Sequence[Batch],
        fixed: bool = False,
    ) -> _Fit:  # fmt: skip
        """The maps with the least squared errors, for the best assignment of heads."""
        pairs = target.rotary.pairs if target.rotary is not None else torch.empty(0, 2).long()
        k, v = _moments(program, first, target, batches)
        maps_k, maps_v = _key_maps(k, pairs, free), _linear(v)
        heads = len(maps_k)
        explained = sum(
            1 - _lost(moments, maps) for moments, maps in ((k, maps_k), (v, maps_v))
        )  # [shared, target]
        order = torch.arange(heads) if fixed else _assigned(cast(Tensor, explained))
        at = torch.arange(heads)
        return _Fit(order, maps_k[at, order], maps_v[at, order])

    def lost(
        self, program: Program, first: Site, target: Site, batches: Sequence[Batch], said: str
    ) -> dict[str, float]:
        """Shares of the energy of keys and values that the shared ones do not explain."""
        at = torch.arange(len(self.order))
        found = {}
        both = _moments(program, first, target, batches)
        for name, moments, maps in zip("kv", both, (self.keys, self.values), strict=True):
            mine = cast(Moments, tuple(x[at, self.order] for x in moments))
            own = mine[2].diagonal(dim1=-2, dim2=-1).sum(-1)
            left = _left(mine, maps)
            found[f"{name}_{said}"] = float(left.sum() / own.sum().clamp(min=1e-300))
        return found


Moments = tuple[Tensor, Tensor, Tensor]


def _moments(
    program: Program, first: Site, target: Site, batches: Sequence[Batch]
) -> tuple[Moments, Moments]:
    """For keys and for values the sums of s s^T, t s^T and t t^T `[shared, target, d, d]` over the
    real tokens, s a shared head and t one of the target's."""
    nodes = [*_operands(program, first), *_operands(program, target)]
    sums: list[list[Tensor]] = [[], []]
    for batch in batches:
        values = peek(program, [node.name for node in nodes], batch)
        for which in (0, 1):
            s, t = (_rows(program, nodes[which + at], values, batch) for at in (0, 2))
            made = [
                torch.einsum("hnd,hne->hde", s, s)[:, None].expand(-1, len(t), -1, -1),
                torch.einsum("gnd,hne->hgde", t, s),
                torch.einsum("gnd,gne->gde", t, t)[None].expand(len(s), -1, -1, -1),
            ]
            old = sums[which] or [torch.zeros_like(x) for x in made]
            sums[which] = [a + b for a, b in zip(old, made, strict=True)]
    k, v = (cast(Moments, tuple(parts)) for parts in sums)
    return k, v


def _rows(program: Program, node: fx.Node, values: dict[str, Tensor], batch: Batch) -> Tensor:
    """A head's vectors at the real tokens, float64 `[heads, tokens, dim]`."""
    value = values[node.name].double().transpose(0, 1)  # [heads, batch, seq, dim]
    valid = real(program, node.name, batch, axes=(0, 2))
    if valid is None:
        return value.flatten(1, 2)
    return value[:, valid.bool()]


def _linear(moments: Moments) -> Tensor:
    """The matrices with the least squared error, `[shared, target, d, d]`."""
    ss, ts, _ = moments
    level = ss.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    eye = torch.eye(ss.shape[-1], dtype=ss.dtype)
    damped, wanted = ss + _DAMPING * level * eye, ts.transpose(-1, -2)
    made: Tensor = torch.linalg.solve(damped, wanted)
    for _ in range(2):  # what the damping took is put back where the data tells it
        made = made + torch.linalg.solve(damped, wanted - ss @ made)
    return made.transpose(-1, -2)


def _key_maps(moments: Moments, pairs: Tensor, free: Freedom) -> Tensor:
    """As `_linear`, as far as the gauge of the queries allows."""
    ss, ts, _ = moments
    shared, target, dim, _ = ss.shape
    made = torch.eye(dim, dtype=ss.dtype).repeat(shared, target, 1, 1)
    rest = unpaired(dim, pairs)
    if len(rest) and free.rest:
        at = rest[:, None], rest[None, :]
        cut = cast(Moments, tuple(x[..., at[0], at[1]] for x in moments))
        made[..., at[0], at[1]] = _linear(cut)
    if not len(pairs) or free.pairs == "none":
        return made
    a, b = pairs[:, 0], pairs[:, 1]
    power = (ss[..., a, a] + ss[..., b, b]).clamp(min=1e-30)
    factor = torch.complex(ts[..., a, a] + ts[..., b, b], ts[..., b, a] - ts[..., a, b]) / power
    if free.pairs == "turn":
        factor = factor / factor.abs().clamp(min=1e-30)
    for s in range(shared):
        for t in range(target):
            turned = complex_scalars(dim, pairs, factor[s, t])
            made[s, t, a] = turned[a]
            made[s, t, b] = turned[b]
    return made


def _left(moments: Moments, maps: Tensor) -> Tensor:
    """Squared error of t ~ M s from the moments, `[...]`."""
    ss, ts, tt = moments
    trace = (tt - 2 * ts @ maps.transpose(-1, -2) + maps @ ss @ maps.transpose(-1, -2)).diagonal(
        dim1=-2, dim2=-1
    )
    return trace.sum(-1).clamp(min=0)


def _lost(moments: Moments, maps: Tensor) -> Tensor:
    """The share of each target head's energy that each shared head leaves, `[shared, target]`."""
    own = moments[2].diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-300)
    return (_left(moments, maps) / own).clamp(0, 1)


def _assigned(explained: Tensor) -> Tensor:
    """For each shared head the target's, one to one, that together explain most; int64."""
    graph = nx.Graph()
    count = len(explained)
    for s in range(count):
        for t in range(count):
            graph.add_edge(("s", s), ("t", t), weight=float(explained[s, t]))
    found = torch.zeros(count, dtype=torch.long)
    for pair in nx.max_weight_matching(graph, maxcardinality=True):
        sides = dict(pair)
        found[sides["s"]] = sides["t"]
    return found


def _install(program: Program, first: Site, target: Site, fitted: _Fit) -> Site:
    """Let the target read the first's keys and values; answers its new facts."""
    heads = Heads.read(program, target)
    queries = heads.of_queries(fitted.order)
    keys, values = (x.repeat_interleave(heads.group, 0) for x in (fitted.keys, fitted.values))
    q = keys.transpose(1, 2) @ heads.q[queries]
    q_path = cast(Path, target.q)
    facts = write_query(program, target, q[..., :-1], q[..., -1] if q_path.bias else None)
    facts = write_output(program, facts, values.transpose(1, 2) @ heads.out[queries])
    attention = program.node(target.node)
    for at, operand in enumerate(_operands(program, first), start=1):
        attention.update_arg(at, operand)
    program.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    for path in (cast(Path, target.k), cast(Path, target.v)):
        for name in filter(None, (path.weight, path.bias)):
            program.drop_weight(name)
    why = f"it reads the keys and values of {first.module or first.id}"
    return replace(facts, k=None, v=None, missing={**target.missing, "k": why, "v": why})
