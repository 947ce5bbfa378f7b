"""Which nodes of a graph belong to an attention site, part by part, and which to a sublayer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import fx

from attnopt.compiler.program import Program
from attnopt.compiler.site import Site, Sublayer

Part = Literal["q", "k", "v", "out", "core", "between"]
PARTS: tuple[Part, ...] = ("q", "k", "v", "out", "core", "between")


def site_parts(program: Program, site: Site) -> dict[str, Part]:
    """The nodes of a site by name, each with its part.

    `q`, `k`, `v`, `out` are the projections' matrix products (one node that serves several counts
    for the last), `core` is the attention itself, and `between` all on a way from an input
    projection to the output projection, with what serves nothing else (weights, masks of its own).
    The norm before the projections belongs to the sublayer, not to the site. A site whose nodes a
    rewrite has removed has no parts.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    if site.node not in nodes:
        return {}
    core = nodes[site.node]
    paths = {"q": site.q, "k": site.k, "v": site.v}
    known = {part: path for part, path in paths.items() if path and path.projection in nodes}
    starts = [nodes[path.projection] for path in known.values()]
    end = nodes.get(site.out.projection, core) if site.out else core
    inside = _between(starts, core) | _between([core], end)
    sources = [nodes[path.source] for path in known.values() if path.source in nodes]
    if starts:
        inside = _with_exclusive(inside, _ancestors(sources), program)
    parts: dict[str, Part] = {node.name: "between" for node in inside}
    if end is not core:
        parts[end.name] = "out"
    for part in ("q", "k", "v"):
        if part in known:
            parts[known[part].projection] = part
    parts[core.name] = "core"
    return parts


def sublayer_nodes(program: Program, sublayer: Sublayer) -> set[str]:
    """The names of the nodes that only this sublayer uses, as far as the graph still has them."""
    present = {node.name for node in program.graph.nodes}
    return ({*sublayer.inner, sublayer.branch} - {sublayer.entry}) & present


def _between(starts: Iterable[fx.Node], end: fx.Node) -> set[fx.Node]:
    """All nodes on a way from one of `starts` to `end`, both ends included."""
    wanted = set(starts)
    order = {node: index for index, node in enumerate(end.graph.nodes)}
    first = min((order[node] for node in wanted), default=order[end])
    above = _ancestors([end], lambda node: order[node] >= first)
    inside = {end}
    for node in sorted(above, key=order.__getitem__):
        if node in wanted or any(parent in inside - {end} for parent in node.all_input_nodes):
            inside.add(node)
    return inside


def _ancestors(ends: Iterable[fx.Node], keep: object = None) -> set[fx.Node]:
    """The nodes that `ends` depend on, themselves included, as long as `keep` holds."""
    found: set[fx.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node in found or (callable(keep) and not keep(node)):
            continue
        found.add(node)
        waiting.extend(node.all_input_nodes)
    return found


def _with_exclusive(inside: set[fx.Node], outside: set[fx.Node], program: Program) -> set[fx.Node]:
    """`inside` and the nodes that serve nothing else, none of `outside` among them."""
    grown = set(inside)
    for node in reversed(list(program.graph.nodes)):
        if node in grown or node in outside or node.op not in ("call_function", "get_attr"):
            continue
        if node.users and all(user in grown for user in node.users):
            grown.add(node)
    return grown
