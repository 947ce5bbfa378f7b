"""Remove whole heads: a key/value head with the query heads that read it.

All four projections and the cache become smaller, and so does the attention itself. Which heads go
is ranked in two ways: by the energy that a head's result adds through the output projection, and by
what doing without it costs once the output projection of the others is fitted again, greedily
(`attnopt.compiler.head_costs`). The second is the optimum of the layer; whether it is also that of
the model differs, so "best" runs both on held-out data and keeps the better one.

The heads that stay get that fit, by a ridge that is chosen on held-out data, where it lowers the
error there. A head whose result is zero goes without any change. The fit is to the program at hand;
run `refit` afterwards, which fits to the original. Source: OSSCAR (Meng et al. 2024), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, choice
from attnopt.compiler.damage import Damage
from attnopt.compiler.head_costs import Results, best_weight
from attnopt.compiler.program import Program
from attnopt.compiler.removal import edited
from attnopt.compiler.site import OutputPath, Site
from attnopt.compiler.site_heads import (
    Heads,
    no_choice,
    resize,
    results,
    share_of_heads,
    unknown,
    usual_kv_heads,
)


@dataclass(frozen=True)
class PruneHeads(Pass):
    """Keep this share of the key/value heads, rounded up; see the module's text for `method`."""

    name: ClassVar[str] = "prune_heads"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    source: ClassVar[str] = "OSSCAR (Meng et al. 2024), section 3; energy of each head's output"
    # Calibrates on the fast form; a bias by distance is found before its heads are picked.
    after: ClassVar[tuple[str, ...]] = ("fuse_attention", "merge_kv_heads", "toeplitz_bias")

    keep: float = choice(0.875, 0.75, 0.5, 0.25, default=0.75)
    method: str = choice("best", "cost", "energy", default="best")

    @classmethod
    def caching(cls, program: Program, share: float) -> tuple[Pass, ...]:
        """As many heads as fit, of those that most sites have."""
        heads = usual_kv_heads(program)
        count = math.floor(share * heads + 1e-9)
        return (cls(keep=count / heads),) if 0 < count < heads else ()

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """Smaller projections for one site, or why not."""
        for miss in (unknown(program, target), self._refused(target, notes)):
            if miss is not None:
                return miss
        fit = _Fit.of(program, target, notes)
        options = {name: fit.option(gone) for name, gone in self._ranked(fit, target).items()}
        facts = options[next(iter(options))].write(program.copy(), target)
        if isinstance(facts, Miss):
            return facts  # it is the graph that does not give way, whichever heads go
        damage = _damage(program, target, notes, options)
        name = min(options, key=lambda key: damage.get(f"damage_{key}", 0.0))
        pick = options[name]
        sites = pick.write(program.copy(), target)
        assert isinstance(sites, Site)

        def edit(copy: Program) -> None:
            pick.write(copy, target)

        return Edit(graph=edit, sites={target.id: sites}, note=self._note(target, name, options),
                    evidence={**fit.evidence(pick), **damage})  # fmt: skip

    def _refused(self, site: Site, notes: Notes) -> Miss | None:
        if not 0 < self.keep <= 1:
            return Miss(f"keep={self.keep} is no share between 0 and 1", site.node)
        return no_choice(site, self.keep, notes)

    def _ranked(self, fit: _Fit, site: Site) -> dict[str, list[int]]:
        """The key/value heads that go, by each ranking that is asked for; equal ones once."""
        count = site.kv_heads - share_of_heads(site, self.keep)
        found: dict[str, list[int]] = {}
        if self.method != "energy":
            found["cost"] = sorted(fit.train.cheapest(fit.blocks, count)[0])
        if self.method != "cost":
            energies = fit.train.energies(fit.blocks)
            found["energy"] = sorted(sorted(range(len(energies)), key=energies.__getitem__)[:count])
        if len(found) == 2 and found["cost"] == found["energy"]:
            del found["energy"]
        return found

    def _note(self, site: Site, name: str, options: Mapping[str, _Option]) -> str:
        pick = options[name]
        fitted = "fitted again" if pick.damping is not None else "as it was"
        ranked = "both rankings" if self.method == "best" and len(options) == 1 else name
        return (f"{site.kv_heads} -> {len(pick.groups)} key/value heads, {pick.heads.group} query "
                f"heads each, by {ranked}; output projection {fitted}")  # fmt: skip


@dataclass(frozen=True)
class _Option:
    """Some key/value heads of a site left.

    `groups` are these heads, `keep` their rows of the output projection, `weight` `[rows, width]`
    what these become. With a bias the last row is its change, and `bias` what it becomes.
    """

    heads: Heads
    groups: list[int]
    keep: Tensor
    weight: Tensor
    bias: Tensor | None
    damping: float | None

    def write(self, program: Program, site: Site) -> Site | Miss:
        """Put the heads that stay into a program's graph; the site's new facts."""
        queries = self.heads.query_heads(self.groups)
        dim, width = self.heads.out.shape[1:]
        rows = self.weight[: len(queries) * dim].reshape(len(queries), dim, width)
        left = Heads(self.heads.q[queries], self.heads.k[self.groups], self.heads.v[self.groups],
                     rows)  # fmt: skip
        return resize(program, site, left, self.bias, self.groups)


@dataclass(frozen=True)
class _Fit:
    """The results of the heads on calibration data, and on held-out data where there is any.

    `blocks` are the rows of the output projection per key/value head.
    """

    heads: Heads
    train: Results
    check: Results | None
    blocks: list[Tensor]
    bias: Tensor | None
    dtype: torch.dtype

    @staticmethod
    def of(program: Program, site: Site, notes: Notes) -> _Fit:
        """From the program as it now is."""
        heads = Heads.read(program, site)
        train, check = results(program, site, notes, heads)
        size = heads.group * heads.out.shape[1]
        blocks = list(torch.arange(len(heads.k) * size).view(-1, size))
        path = cast(OutputPath, site.out)
        bias = None if path.bias is None else program.weight(path.bias).detach().double()
        dtype = program.weight(path.weight).dtype
        assert train is not None
        return _Fit(heads, train, check, blocks, bias, dtype)

    def option(self, gone: list[int]) -> _Option:
        """The heads that stay, their output projection fitted where that helps on held-out data."""
        groups = [g for g in range(len(self.blocks)) if g not in gone]
        rows = [self.blocks[g] for g in groups]
        if self.bias is not None:
            rows.append(torch.tensor([len(self.train.weight) - 1]))
        keep = torch.cat(rows)
        old = self.train.weight[keep]
        weight, damping = best_weight(self.train, self.check, keep, old)
        bias = None if self.bias is None else self.bias + weight[-1]
        return _Option(self.heads, groups, keep, weight, bias, damping)

    def evidence(self, pick: _Option) -> dict[str, float]:
        """Shares of the attention's output energy that are lost.

        `predicted` by the closed form for the best fit to the calibration data, `residual` and
        `heldout` with the weights that are written, `unfitted` with those of before.
        """
        gone = [block for g, block in enumerate(self.blocks) if g not in pick.groups]
        weight = pick.weight.to(self.dtype).double()
        found = {
            "predicted": self.train.cost(torch.cat(gone)),
            "residual": self.train.lost(pick.keep, weight),
            "unfitted": self.train.lost(pick.keep, self.train.weight[pick.keep]),
        }
        if self.check is not None:
            found["heldout"] = self.check.lost(pick.keep, weight)
        return found


def _damage(
    program: Program, site: Site, notes: Notes, options: Mapping[str, _Option]
) -> dict[str, float]:
    """How far each option takes the model's outputs from the original's on held-out data, where
    there are several."""
    if len(options) < 2 or not notes.heldout:
        return {}
    damage = Damage(notes.original, notes.heldout)

    found = {}
    for name, option in options.items():

        def edit(copy: Program, option: _Option = option) -> None:
            option.write(copy, site)

        found[f"damage_{name}"] = damage(edited(program, edit))
    return found
