"""Which heads of an attention a token can do without, learned from calibration data.

z_g are the results of a key/value head's query heads, W_g their rows of the output projection. A
head that is off gives its mean m_g over the tokens that it is off for instead, so that a token
loses |sum over heads off of (z_g - m_g) W_g|^2. Heads that are always on are those of the greatest
energy |(z_g - mean z_g) W_g|^2; among the others each token takes those of the highest score:

    "norm"    |q_g|, the router without parameters of MoH's converted LLaMA
    "linear"  a ridge regression of |(z_g - mean z_g) W_g| on the layer's input

Source: MoH (Jin et al. 2024, arXiv:2410.11842), section 3; there the model is trained afterwards,
here the means stand in for what is lost, and a refit of the output projection follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from attnopt.compiler.grams import Gram, real, rows, with_one
from attnopt.compiler.program import Batch, Program, peek
from attnopt.compiler.ridge import solve
from attnopt.compiler.route_graph import Router, input_of, norms
from attnopt.compiler.site import OutputPath, Site
from attnopt.compiler.site_weights import read_output

_ROWS = 4096  # tokens that are multiplied at a time
_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)  # the strongest all but ranks heads by their means


@dataclass(frozen=True)
class Seen:
    """What a site does with tokens: float32 at least.

    `z` `[tokens, heads, v_dim]` are the results, `norms` `[tokens, groups]` those of the queries,
    `x` `[tokens, width]` what they are made of, where a linear map can read it; `rows`
    `[heads, v_dim, width]` of the output projection read the results.
    """

    z: Tensor
    norms: Tensor
    x: Tensor | None
    rows: Tensor

    @staticmethod
    def of(program: Program, site: Site, batches: Sequence[Batch]) -> Seen:
        """From the program as it now is, at real tokens."""
        probe = program.copy()
        score = norms(probe, probe.node(site.node), site.kv_heads)
        probe.module.recompile()
        source = input_of(probe, site)
        names = [site.node, score.name, *([source.name] if source is not None else ())]
        z, told, *x = map(torch.cat, zip(*_parts(probe, site, names, batches), strict=True))
        weight = read_output(program, cast(OutputPath, site.out)).to(z.dtype)
        z = z.unflatten(1, tuple(weight.shape[:2]))
        return Seen(z, told, x[0] if x else None, weight)

    def halves(self) -> tuple[Seen, Seen]:
        """The first half of the tokens and the others: whole sequences where they are of one length
        and their number is even."""
        at = len(self.z) // 2
        first, second = (
            replace(self, z=self.z[half], norms=self.norms[half],
                    x=None if self.x is None else self.x[half])
            for half in (slice(at), slice(at, None))
        )  # fmt: skip
        return first, second

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.norms.shape[1]

    @property
    def energy(self) -> float:
        """The sum over tokens of |z W|^2."""
        return self._squares(self.z)

    def means(self, off: Tensor) -> Tensor:
        """The mean of each head's results `[heads, v_dim]` over the tokens where its key/value
        head is off, bool `[tokens, groups]`; over all of them where it never is."""
        every = ~off.any(0)
        weight = (off | every).to(self.z.dtype)
        weight = self._by_head(weight / weight.sum(0))
        return torch.einsum("th,thd->hd", weight, self.z)

    def parts(self, mean: Tensor) -> Tensor:
        """|(z_g - mean_g) W_g| `[tokens, groups]` for means `[heads, v_dim]`."""
        apart = (self.z - mean).unflatten(1, (self.groups, -1)).flatten(2)
        weight = self.rows.unflatten(0, (self.groups, -1)).flatten(1, 2)
        metric = weight @ weight.transpose(1, 2)
        return torch.einsum("tgi,gij,tgj->tg", apart, metric, apart).clamp(min=0).sqrt()

    def lost(self, router: Router, scores: Tensor) -> float:
        """The share of the output's energy that a router loses by scores `[tokens, groups]`."""
        off = self._by_head(~router.on(scores))
        return self._squares((self.z - router.rest) * off[..., None]) / max(self.energy, 1e-300)

    def scores(self, router: Router) -> Tensor:
        """What a router makes of these tokens, `[tokens, groups]`."""
        if router.weight is None or self.x is None:
            return self.norms
        return torch.nn.functional.linear(self.x, router.weight, router.bias)

    def _by_head(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(len(self.rows) // self.groups, 1)

    def _squares(self, results: Tensor) -> float:
        weight = self.rows.flatten(0, 1)
        cut = results.flatten(1).split(_ROWS)
        return sum(float((part @ weight).square().sum(dtype=torch.float64)) for part in cut)


def _parts(
    program: Program, site: Site, names: Sequence[str], batches: Sequence[Batch]
) -> Iterator[list[Tensor]]:
    """The values of nodes at real tokens, `[tokens, ...]` of each batch; the first one is the
    attention."""
    for batch in batches:
        values = peek(program, names, batch)
        values[site.node] = values[site.node].transpose(1, 2).flatten(2)
        valid = real(program, site.node, batch, (0, 2))
        found = [rows(values[name], valid) for name in names]
        yield [x if x.dtype == torch.float64 else x.float() for x in found]


def routers(seen: Seen, count: int, shared: int) -> dict[str, Router]:
    """The routers that data can tell of: "norm", "linear" where the layer's input is known (one
    per ridge, "linear0" and so on), and "fixed": the same heads for every token."""
    everywhere = seen.means(torch.ones_like(seen.norms, dtype=torch.bool))
    parts = seen.parts(everywhere)
    order = parts.square().sum(0).argsort(descending=True)
    always = torch.zeros(seen.groups, dtype=torch.bool)
    always[order[:shared]] = True
    start = Router(count, always, everywhere)
    found = {"norm": start}
    if seen.x is not None:
        x = with_one(seen.x.double())
        sums = Gram.empty(x.shape[1], seen.groups)
        sums.add(x, parts.double())
        old = torch.zeros(x.shape[1], seen.groups, dtype=torch.float64)
        old[-1] = parts.double().mean(0)
        for at, damping in enumerate(_DAMPINGS):
            fitted = solve(sums, old, damping)[0].to(seen.x.dtype)
            found[f"linear{at}"] = replace(
                start, weight=fitted[:-1].T.contiguous(), bias=fitted[-1]
            )
    fixed = always.clone()
    fixed[order[:count]] = True
    found["fixed"] = replace(start, shared=fixed)
    return {name: _with_means(seen, router) for name, router in found.items()}


def least(seen: Seen, count: int, shared: Tensor, rest: Tensor) -> float:
    """What is lost where each token has the heads of its greatest parts, as no router can know
    them."""
    router = Router(count, shared, rest)
    scores = seen.parts(rest)
    return seen.lost(_with_means(seen, router, scores), scores)


def _with_means(seen: Seen, router: Router, scores: Tensor | None = None) -> Router:
    """The router with the means of the heads that it leaves off."""
    scores = seen.scores(router) if scores is None else scores
    return replace(router, rest=seen.means(~router.on(scores)))
