"""The projections of a site by head, as one value, and a site made anew from others of another
size: fewer heads, or heads of fewer dims.

Sizes of the operands hang together (query heads share key/value heads, q and k have one head_dim),
so all that change are rebuilt first, and the attention gets them and its spec at once. What stands
between the attention and the output projection is cloned as `compiler.reproject` does it before the
attention, and masks or biases with one slice per head lose those of heads that go.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Miss, Notes
from attnopt.compiler.grams import latest_moments
from attnopt.compiler.head_costs import Results
from attnopt.compiler.layout import same_size
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Program, infer
from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.raising.index_probe import output_channels, small_sizes
from attnopt.compiler.raising.projections import projection
from attnopt.compiler.reproject import Cut, Which, between_nodes, clone_all, rebuilt
from attnopt.compiler.site import OutputPath, Path, Site
from attnopt.compiler.site_weights import read_output, read_weight, rewired
from attnopt.compiler.spec import AttentionSpec

aten = torch.ops.aten
WHICH: tuple[Which, ...] = ("q", "k", "v")


@dataclass(frozen=True)
class Heads:
    """The projections of a site, float64, the bias of q, k and v as last column.

    `q` `[heads, head_dim, width + 1]`, `k` `[kv_heads, head_dim, width + 1]`, `v`
    `[kv_heads, v_dim, width + 1]`, `out` `[heads, v_dim, width]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor

    @staticmethod
    def read(program: Program, site: Site) -> Heads:
        """The projections as they stand in the program; all four must be known."""
        q, k, v = (
            _with_bias(*read_weight(program, cast(Path, getattr(site, which)))) for which in WHICH
        )
        return Heads(q, k, v, read_output(program, cast(OutputPath, site.out)))

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return len(self.q) // len(self.k)

    def read_by(self, per_query: Tensor) -> Tensor:
        """Sum `[heads, d, d]` over the query heads of each key/value head: `[kv_heads, d, d]`."""
        return per_query.reshape(len(self.k), self.group, *per_query.shape[1:]).sum(1)

    def queries(self, gram: Tensor) -> Tensor:
        """Second moments of the queries that read each key head, `[kv_heads, dim, dim]`; `gram`
        `[width + 1, width + 1]` is that of what the query projection reads."""
        return self.read_by(self.q @ gram @ self.q.transpose(1, 2))

    def outputs(self) -> Tensor:
        """What the output projection makes of each value head, `[kv_heads, v_dim, v_dim]`."""
        return self.read_by(self.out @ self.out.transpose(1, 2))

    def of_queries(self, order: Tensor) -> Tensor:
        """The order of the query heads when key/value heads have this one."""
        return (order[:, None] * self.group + torch.arange(self.group)).flatten()

    def query_heads(self, groups: Sequence[int]) -> list[int]:
        """The query heads that read these key/value heads."""
        return [g * self.group + i for g in groups for i in range(self.group)]


def share_of_heads(site: Site, share: float) -> int:
    """How many key/value heads are at least this share of a site's."""
    return max(1, math.ceil(share * site.kv_heads - 1e-9))


def usual_kv_heads(program: Program) -> int:
    """How many key/value heads most sites of a program have; 0 without sites."""
    counts = Counter(site.kv_heads for site in program.sites)
    return counts.most_common(1)[0][0] if counts else 0


def no_choice(site: Site, share: float, notes: Notes) -> Miss | None:
    """Why there is no choice of this share of a site's key/value heads; None where there is."""
    if site.kv_heads == 1:
        return Miss("there is one key/value head", site.node)
    if share_of_heads(site, share) == site.kv_heads:
        return Miss(f"a share of {share:g} of {site.kv_heads} key/value heads is all of them",
                    site.node)  # fmt: skip
    if not notes.calibration:
        return Miss("what a head adds is not known without calibration data", site.node,
                    help="give --text FILE")  # fmt: skip
    return None


def unknown(program: Program, site: Site) -> Miss | None:
    """Why the projections of a site cannot be made anew in another size, as far as its facts
    tell."""
    for which in (*WHICH, "out"):
        if getattr(site, which) is None:
            why = site.missing.get(which, "not known")
            return Miss(f"the projection of {which} was not found: {why}", site.node)
    out = cast(OutputPath, site.out)
    if not program.has(out.projection):
        return Miss("an earlier rewrite took the output projection away", out.projection)
    weight = program.weight(out.weight)
    if not out.channels.numel():
        return Miss("the output projection has factors, none of whose columns is a head's",
                    out.projection)  # fmt: skip
    if out.channels.numel() != weight.shape[1 if out.layout == "out_in" else 0]:
        return Miss("the output projection reads more than the heads", out.projection)
    for path in (cast(Path, site.k), cast(Path, site.v)):
        if len(torch.unique(path.channels)) < path.channels.numel():
            return Miss("key/value heads repeat in an order of their own", path.projection)
    return None


def output_source(program: Program, site: Site) -> fx.Node:
    """The node that the output projection of a site reads."""
    made = projection(program.node(cast(OutputPath, site.out).projection))
    assert made is not None
    return made.source


def results(
    program: Program, site: Site, notes: Notes, heads: Heads
) -> tuple[Results | None, Results | None]:
    """What the heads of a site give, in the program as it now is, on calibration data and on
    held-out data; None where there is none."""
    path = cast(OutputPath, site.out)
    name = output_source(program, site).name
    found: list[Results | None] = []
    for batches in (notes.calibration, notes.heldout):
        if not batches:
            found.append(None)
            continue
        seen = latest_moments(program, [name], batches)[name]
        found.append(Results.of(seen, path.channels, heads.out, path.bias is not None))
    return found[0], found[1]


def resize(
    program: Program,
    site: Site,
    new: Heads,
    bias: Tensor | None = None,
    groups: Sequence[int] | None = None,
    cuts: Mapping[Which, Cut] | None = None,
) -> Site | Miss:
    """Give a site new projections of other sizes, in this program's graph.

    `groups` are the key/value heads that stay, of those the site has now; all of them where it is
    None, and then `cuts` says of each operand that is made anew how its heads lose dims. `bias`
    `[width]` is a new bias of the output projection. Answers the site with its new facts, or what
    stood in the way; the program is then half edited and must be thrown away.
    """
    missing = unknown(program, site)
    if missing is not None:
        return missing
    chosen = list(WHICH) if groups is not None else list(cuts or {})
    operands = list(cast(tuple[Any, ...], program.node(site.node).args)[:3])
    paths: dict[str, Path] = {}
    for which in chosen:
        made = _operand(program, site, which, getattr(new, which), (cuts or {}).get(which))
        if isinstance(made, Miss):
            return made
        operands[WHICH.index(which)], paths[which] = made
    attention = program.node(site.node)
    spec = program.spec(site).with_(
        heads=len(new.q), head_dim=new.q.shape[1], v_dim=new.v.shape[1],
        kv_heads=int(operands[1].meta["val"].shape[1]),
    )  # fmt: skip
    facts: dict[str, Any] = {**paths, "spec": spec, "kv_heads": len(new.k)}
    old: list[Path] = [getattr(site, which) for which in chosen]
    if groups is None and spec.v_dim == site.spec.v_dim:
        attention.args = (*operands, attention.args[3], spec.text)
        infer(attention)
        _sweep(program, old)
        return replace(site, **facts)
    changed = _rejoined(program, site, operands, spec, groups)
    if isinstance(changed, Miss):
        return changed
    out = _output(program, replace(site, out=changed), new.out, bias)
    if isinstance(out, Miss):
        return out
    _sweep(program, [*old, cast(OutputPath, site.out)])
    return replace(site, out=out, **facts)


def _operand(
    program: Program, site: Site, which: Which, heads: Tensor, cut: Cut | None
) -> tuple[fx.Node, Path] | Miss:
    count, dim, _ = heads.shape
    flat = heads.reshape(count * dim, -1)
    path = cast(Path, getattr(site, which))
    bias = flat[:, -1] if path.bias or bool(flat[:, -1].any()) else None
    return rebuilt(program, site, which, flat[:, :-1], bias, count, cut)


def _rejoined(
    program: Program,
    site: Site,
    operands: list[fx.Node],
    spec: AttentionSpec,
    groups: Sequence[int] | None,
) -> OutputPath | Miss:
    """Let the attention read the new operands and the output projection its new result."""
    attention = program.node(site.node)
    path = cast(OutputPath, site.out)
    reader, source = program.node(path.projection), output_source(program, site)
    # A twin stands for the attention as it was, so that its node and its name stay.
    stale = program.call(ATTENTION, attention.args, before=attention)
    attention.replace_all_uses_with(stale)
    chain = between_nodes(stale, source) if source is not stale else []
    if chain is None:
        return Miss("the output projection does not read the attention alone", path.projection)
    known = {stale, *chain, reader}
    others = [user for node in (stale, *chain) for user in node.users if user not in known]
    if others:
        return Miss("something else reads the heads' results too", others[0].name)
    extras = cast(list[fx.Node], attention.args[3])
    if groups is not None:
        own = spec.heads // len(groups)
        queries = [g * own + i for g in groups for i in range(own)]
        extras = [_slices(program, site, extra, queries) for extra in extras]
    attention.args = (*operands, extras, spec.text)
    infer(attention)
    values = clone_all(program, chain, {stale: attention})
    if isinstance(values, Miss):
        return values
    reader.replace_input_with(source, values[source])
    return path


def _slices(program: Program, site: Site, extra: fx.Node, queries: list[int]) -> fx.Node:
    """A mask or bias at the query heads that stay, where it has one slice per head."""
    shape = extra.meta["val"].shape
    axis = len(shape) - 3
    if axis < 0 or len(shape) < 3 or shape[axis] == 1:
        return extra
    attention = program.node(site.node)
    base = f"heads_kept_{site.id.replace('.', '_')}"
    index = program.parameter(_unused(program, base), torch.tensor(queries), before=attention)
    return program.call(aten.index_select.default, (extra, axis, index), before=attention)


def _output(program: Program, site: Site, rows: Tensor, bias: Tensor | None) -> OutputPath | Miss:
    """Put `[heads, v_dim, width]` in the output projection's place, its input columns as the new
    graph lays them out."""
    path = cast(OutputPath, site.out)
    attention, reader = program.node(site.node), program.node(path.projection)
    source = output_source(program, site)
    if not same_size(source.meta["val"].shape[-1], rows.shape[0] * rows.shape[1]):
        return Miss("the smaller heads do not come out side by side", source.name)
    try:
        channels = output_channels(program, attention, source, small_sizes(program))
    except Unknown as reason:
        return Miss(f"the smaller heads do not reach the output projection: {reason}", reader.name)
    dtype = program.weight(path.weight).dtype
    weight = torch.empty(rows.shape[0] * rows.shape[1], rows.shape[2], dtype=torch.float64)
    weight[channels.reshape(-1)] = rows.reshape(len(weight), -1)
    flipped = weight if path.layout == "in_out" else weight.T
    name = rewired(program, reader, path.weight, flipped.contiguous().to(dtype))
    bias_name = path.bias
    if bias is not None and path.bias is not None:
        bias_name = rewired(program, reader, path.bias, bias.to(dtype))
    return replace(path, weight=name, bias=bias_name, channels=channels)


def _sweep(program: Program, paths: Sequence[Path | OutputPath]) -> None:
    """Drop what nothing reads any more, the weights of these paths too."""
    program.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    for name in {name for path in paths for name in (path.weight, path.bias) if name}:
        program.drop_weight(name)


def _unused(program: Program, base: str) -> str:
    taken = {name for name, _ in program.module.named_buffers(remove_duplicate=False)}
    return next(f"{base}_{i}" for i in range(len(taken) + 1) if f"{base}_{i}" not in taken)


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    last = torch.zeros_like(weight[..., 0]) if bias is None else bias
    return torch.cat((weight, last[..., None]), dim=-1)
