"""Which sites a rewrite has touched, and which parameters are theirs alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from attnopt.compiler.program import Program, attribute
from attnopt.compiler.regions import site_parts
from attnopt.compiler.site import Site


@dataclass(frozen=True)
class Touched:
    """The parameters to train, by the id of their site, in the order of the graph.

    One that several sites read stands at the first of them, and in `shared`.
    """

    names: Mapping[str, tuple[str, ...]]
    shared: frozenset[str] = frozenset()


def touched(program: Program, original: Program) -> Touched:
    """What to train in a program.

    A site is touched where its spec or one of its parameters is another than the original's; all
    sites are where the original has residual sublayers that the program lacks, since whatever
    follows them sees another stream.
    """
    mine, theirs = parameters(program, original), parameters(original, original)
    every = len(program.sublayers) < len(original.sublayers)
    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for site in program.sites:
        names = mine[site.id]
        if not every and not _changed(program, original, site, names, theirs.get(site.id, ())):
            continue
        own = tuple(name for name in names if name not in taken)
        taken.update(own)
        if own:
            found[site.id] = own
    counts = [name for names in mine.values() for name in names]
    return Touched(found, frozenset(name for name in taken if counts.count(name) > 1))


def parameters(program: Program, original: Program) -> dict[str, tuple[str, ...]]:
    """The floating-point parameters that each site of a program reads, by its id: those that
    nothing but sites reads."""
    parts = {site.id: site_nodes(program, site, original) for site in program.sites}
    inside = set[str]().union(*parts.values())
    tables = dict(program.module.named_parameters(remove_duplicate=False))
    readers: dict[str, set[str]] = {}
    for node in program.graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and name in tables and tables[name].is_floating_point():
            readers.setdefault(name, set()).update(user.name for user in node.users)
    own = {name: users for name, users in readers.items() if users <= inside}
    return {
        id: tuple(name for name, users in own.items() if users & nodes)
        for id, nodes in parts.items()
    }


def site_nodes(program: Program, site: Site, original: Program) -> set[str]:
    """The names of a site's nodes, and of the products with weights that the original has not, on
    the way into this site alone: a rewrite has split a projection into two."""
    inside = set(site_parts(program, site))
    known = dict(original.module.named_parameters(remove_duplicate=False))
    for node in reversed(list(program.graph.nodes)):
        read = [n for n in (node, *node.all_input_nodes) if n.op == "get_attr"]
        new = any(str(n.target) not in known and _floating(program, n) for n in read)
        if new and node.users and all(user.name in inside for user in node.users):
            inside.add(node.name)
    return inside


def _floating(program: Program, node: fx.Node) -> bool:
    value = attribute(program.module, str(node.target))
    return isinstance(value, torch.nn.Parameter) and value.is_floating_point()


def _changed(
    program: Program, original: Program, site: Site, names: tuple[str, ...], known: tuple[str, ...]
) -> bool:
    before = next((other for other in original.sites if other.id == site.id), None)
    if before is None or not original.has(before.node):
        return True
    if program.spec(site) != original.spec(before) or set(names) != set(known):
        return True
    return any(not _same(program, original, name) for name in names)


def _same(program: Program, original: Program, name: str) -> bool:
    mine, theirs = attribute(program.module, name), attribute(original.module, name)
    if mine is theirs:
        return True
    return mine.shape == theirs.shape and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
