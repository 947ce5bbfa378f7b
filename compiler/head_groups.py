"""Which heads go together: groups of one size, each of heads that are alike, and whether heads may
change places at all."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Miss
from attnopt.compiler.gauge import permutes
from attnopt.compiler.program import Program
from attnopt.compiler.site import Site


def groups_of(similarity: Tensor, groups: int) -> Tensor:
    """An order of the heads, int64 `[heads]`, in which consecutive ones form the groups.

    `similarity` is `[heads, heads]`. Begins with neighbours and exchanges the two heads that gain
    most, until none do: the sum of similarities within groups never falls below the neighbours'.
    """
    count = len(similarity)
    size = count // groups
    own = torch.arange(count) // size
    alike = similarity.double().clone().fill_diagonal_(0.0)
    while True:
        to = alike @ torch.nn.functional.one_hot(own, groups).double()  # [heads, groups]
        moved = to[:, own] - to.gather(1, own[:, None])  # head a in the place of head b
        gain = moved + moved.T - 2 * alike
        gain[own[:, None] == own[None, :]] = 0.0
        best = int(gain.argmax())
        a, b = divmod(best, count)
        if not gain[a, b] > 1e-12 * count:
            return own.argsort(stable=True)
        own[a], own[b] = int(own[b]), int(own[a])


def fixed_order(program: Program, site: Site, queries: Tensor, order: Tensor) -> Miss | None:
    """Why the heads of a site cannot change places; None where they can."""
    if torch.equal(order, torch.arange(len(order))):
        return None
    extras = cast(list[fx.Node], program.node(site.node).args[3])
    for name, extra in zip(program.spec(site).extras, extras, strict=True):
        shape = extra.meta["val"].shape
        if name != "padding" and len(shape) >= 3 and shape[-3] != 1:
            return Miss("heads that are told apart by a bias keep their places", extra.name)
    for which, wanted in (("q", queries), ("k", order), ("v", order)):
        if not permutes(program, site, which, wanted):  # type: ignore[arg-type]
            return Miss(f"the heads of {which} are not treated alike", site.node)
    return None
