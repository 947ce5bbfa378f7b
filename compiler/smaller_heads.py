"""A site's heads with fewer dims: the closed forms of `attnopt.compiler.head_dims` on a site's own
projections and data, for the passes that cut heads.

Which operands are made anew and how they are cut is said for `site_heads.resize`; facts about
rotary follow. What cannot be cut is a `Miss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from attnopt.compiler import head_dims
from attnopt.compiler.contract import Miss
from attnopt.compiler.cut_dims import DimCut
from attnopt.compiler.gauge import freedom
from attnopt.compiler.grams import Gram
from attnopt.compiler.head_costs import Results, best_weight
from attnopt.compiler.head_dims import Basis, Keys
from attnopt.compiler.program import Program
from attnopt.compiler.reproject import Which
from attnopt.compiler.site import OutputPath, Path, Rotary, Site
from attnopt.compiler.site_heads import WHICH, Heads


def fixed_keys(program: Program, site: Site) -> Miss | None:
    """Why queries and keys keep their dims, as far as what stands after them tells."""
    if "rotary" in site.missing:
        why = f"the rotary embedding is not understood: {site.missing['rotary']}"
        return Miss(f"queries and keys stay: {why}", site.node)
    pairs, dim = rotary_pairs(site), cast(Path, site.k).channels.shape[1]
    free = freedom(program, site, "q") & freedom(program, site, "k")
    whole = (free.pairs == "scale" or not len(pairs)) and (free.rest or 2 * len(pairs) == dim)
    return None if whole else Miss(f"queries and keys stay: {free.why}", site.node)


def fitted_keys(site: Site, heads: Heads, grams: Mapping[str, Gram], dims: int) -> Keys | Miss:
    """The best queries and keys of `dims` dims on inputs of these moments."""
    query, key = qk_moments(heads, site, grams)
    try:
        return head_dims.keys(query, key, rotary_pairs(site), dims)
    except ValueError as reason:
        return Miss(f"queries and keys stay: {reason}", site.node)


def fitted_values(
    program: Program, site: Site, heads: Heads, train: Results, check: Results | None, dims: int
) -> Values:
    """The best values of `dims` dims, and the output projection fitted to them."""
    path = cast(OutputPath, site.out)
    bias = None if path.bias is None else program.weight(path.bias).detach().double()
    return Values.fit(heads, train, check, bias, dims)


@dataclass(frozen=True)
class Values:
    """A smaller basis for values, with the output projection that was fitted to it.

    `out` is `[heads, less, width]`, `unfitted` the same from the basis alone.
    """

    basis: Basis
    out: Tensor
    bias: Tensor | None
    lost: dict[str, float]

    @staticmethod
    def fit(
        heads: Heads, train: Results, check: Results | None, bias: Tensor | None, dims: int
    ) -> Values:
        """From the results of the heads; `bias` is the output projection's, where it has one."""
        count, _, width = heads.out.shape
        group = heads.group
        basis = value_basis(heads, train, dims)
        down = basis.down.repeat_interleave(group, dim=0)
        by = torch.block_diag(*down)
        old = (basis.up.repeat_interleave(group, dim=0) @ heads.out).reshape(-1, width)
        if bias is not None:
            by = torch.block_diag(by, torch.ones(1, 1, dtype=by.dtype))
            old = torch.cat((old, torch.zeros_like(old[:1])))
        weight, _ = best_weight(train, check, by, old)
        lost = {"out_unfitted": train.lost(by, old), "out_residual": train.lost(by, weight)}
        if check is not None:
            lost["out_heldout"] = check.lost(by, weight)
        out = weight[: count * dims].reshape(count, dims, width)
        return Values(basis, out, None if bias is None else bias + weight[-1], lost)


def value_basis(heads: Heads, train: Results, dims: int) -> Basis:
    """The basis of `dims` dims for what heads give, as the output projection reads them."""
    count, dim, _ = heads.out.shape
    own = train.gram[: count * dim, : count * dim].view(count, dim, count, dim)
    own = own.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return head_dims.values(heads.read_by(own), heads.outputs(), dims)


def cuts(program: Program, site: Site, kept: Mapping[Which, Tensor]) -> dict[Which, DimCut]:
    """How operands are cut to the dims `kept`, in the order of q, k, v."""
    tables: dict[Any, fx.Node] = {}
    ordered = [which for which in WHICH if which in kept]
    return {which: DimCut(program, site, which, kept[which], tables) for which in ordered}


def rotary_pairs(site: Site) -> Tensor:
    """The rotary pairs of a head, int64 `[pairs, 2]`, none without rotary."""
    return site.rotary.pairs if site.rotary is not None else torch.empty(0, 2).long()


def qk_moments(heads: Heads, site: Site, grams: Mapping[str, Gram]) -> tuple[Tensor, Tensor]:
    """Second moments of queries (summed over those that share a key) and keys, before rotary,
    `[kv_heads, dim, dim]`."""
    c_q, c_k = (grams[cast(Path, path).source].xx for path in (site.q, site.k))
    query = (heads.q @ c_q @ heads.q.mT).unflatten(0, (-1, heads.group)).sum(1)
    return query, heads.k @ c_k @ heads.k.mT


def logits_lost(old: Heads, new: Heads, keys: Keys, site: Site, grams: Mapping[str, Gram]) -> float:
    """The share of the logits' energy that new queries and keys lose, from the weights."""
    pairs = rotary_pairs(site)
    query, key = qk_moments(old, site, grams)
    gone = torch.ones(len(pairs), dtype=torch.bool)
    gone[keys.pairs] = False
    power = head_dims.pair_energies(query, key, pairs)
    at = torch.isin(keys.kept, keys.rest).nonzero().flatten()
    c_q, c_k = (grams[cast(Path, path).source].xx for path in (site.q, site.k))
    rows = [
        (heads.q[:, dims].unflatten(0, (-1, old.group)), heads.k[:, dims])
        for heads, dims in ((old, keys.rest), (new, at))
    ]
    total = wrong = 0.0
    for h in range(old.group):
        first, second = (q[:, h].mT @ k for q, k in rows)
        total += _logit_energy(first, c_q, c_k)
        wrong += _logit_energy(first - second, c_q, c_k)
    return (wrong + float(power[gone].sum())) / max(total + float(power.sum()), 1e-300)


def _logit_energy(form: Tensor, c_q: Tensor, c_k: Tensor) -> float:
    """The sum over all pairs of rows x, y of (x M y)^2 for forms M `[heads, width, width]`."""
    return float(((c_q @ form @ c_k) * form).sum())


def cut_rotary(old: Rotary, keys: Keys) -> Rotary:
    """The rotary of heads that kept these dims, numbered anew."""
    place = {int(dim): at for at, dim in enumerate(keys.kept)}
    pairs = [[place[int(d)] for d in pair] for pair in old.pairs[keys.pairs]]
    frequencies = old.frequencies[keys.pairs]
    return replace(old, pairs=torch.tensor(pairs), frequencies=frequencies)
