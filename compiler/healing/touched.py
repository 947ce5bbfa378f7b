"""Which sites a rewrite has touched, and which parameters are theirs alone."""

from __future__ import annotations

import torch

from attnopt.compiler.program import Program, attribute
from attnopt.compiler.regions import site_parts
from attnopt.compiler.site import Site


def touched(program: Program, original: Program) -> dict[str, tuple[str, ...]]:
    """The parameters to train, by the id of their site, in the order of the graph.

    A site is touched where its spec or one of its parameters is another than the original's; all
    sites are where the original has residual sublayers that the program lacks, since whatever
    follows them sees another stream. A parameter that serves several sites is named for the first.
    """
    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    every = len(program.sublayers) < len(original.sublayers)
    for site in program.sites:
        names = parameters(program, site)
        if not every and not _changed(program, original, site, names):
            continue
        mine = tuple(name for name in names if name not in taken)
        taken.update(mine)
        if mine:
            found[site.id] = mine
    return found


def parameters(program: Program, site: Site) -> tuple[str, ...]:
    """The floating-point parameters that a site alone reads, or shares with other sites only."""
    inside = set(site_parts(program, site))
    others = {name for other in program.sites for name in site_parts(program, other)}
    tables = dict(program.module.named_parameters(remove_duplicate=False))
    found: list[str] = []
    for node in program.graph.nodes:
        name = str(node.target)
        if node.op != "get_attr" or name not in tables or name in found:
            continue
        readers = {reader.name for n in program.parameter_nodes(name) for reader in n.users}
        own = bool(readers & inside) and readers <= others
        if own and tables[name].is_floating_point():
            found.append(name)
    return tuple(found)


def _changed(program: Program, original: Program, site: Site, names: tuple[str, ...]) -> bool:
    before = next((other for other in original.sites if other.id == site.id), None)
    if before is None or not original.has(before.node):
        return True
    if program.spec(site) != original.spec(before):
        return True
    known = set(parameters(original, before))
    return set(names) != known or any(not _same(program, original, name) for name in names)


def _same(program: Program, original: Program, name: str) -> bool:
    mine, theirs = attribute(program.module, name), attribute(original.module, name)
    if mine is theirs:
        return True
    return mine.shape == theirs.shape and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
