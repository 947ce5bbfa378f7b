"""Let each token run some of the heads only: those it needs most, and a few that all tokens share.

A router scores the key/value heads for a token, with the query heads that read them; of those that
are not shared the best are on, up to `active` of all. A head that is off adds what it adds on
average over the tokens that it is off for. Two routers are known (`attnopt.compiler.routing`): the
norm of the head's queries, which has no parameters, and a linear map of the layer's input, fitted
in closed form to what each head adds. "best" keeps the one that loses less on one half of the
held-out data (`compared_*`); what is told of the other half (`heldout*`) has chosen nothing.

Nothing gets cheaper for a whole sequence, since another token may need a key that this one does
not: what is saved are reads of the cache in a step of one sequence, where it holds all keys and
values (no window, no latent) and is long (`attnopt.compiler.attend_routed`). MoH trains the model
afterwards; without that, and with `refit` alone, this is experimental. Source: MoH (Jin et al.
2024, arXiv:2410.11842), section 3, and its router of LLaMA3-8B for "norm".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass, choice
from attnopt.compiler.program import Program
from attnopt.compiler.regions import Part
from attnopt.compiler.route_graph import Router, gate_of, input_of, install
from attnopt.compiler.routing import Seen, least, routers
from attnopt.compiler.site import Site
from attnopt.compiler.site_heads import no_choice, share_of_heads


@dataclass(frozen=True)
class RouteHeads(Pass):
    """Run this share of the key/value heads for a token, rounded up, `shared` of them always."""

    name: ClassVar[str] = "route_heads"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    source: ClassVar[str] = "MoH (Jin et al. 2024), section 3; routers fitted in closed form"
    # The heads that are routed are those that are left.
    after: ClassVar[tuple[str, ...]] = (
        "fold_repeated_kv", "fuse_attention", "merge_kv_heads", "prune_heads", "shrink_head_dim",
        "share_kv_layers",
    )  # fmt: skip
    # A whole sequence reads every head: what is saved is in a step of one sequence.
    removes: ClassVar[tuple[Part, ...]] = ()

    active: float = choice(0.75, 0.5, default=0.75)
    shared: float = choice(0.5, 0.0, default=0.5)
    router: str = choice("best", "norm", "linear", default="best")

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """A gate behind one site's attention, or why not."""
        miss = self._refused(target, program, notes)
        if miss is not None:
            return miss
        train = Seen.of(program, target, notes.calibration)
        compared, judged = train, None
        if notes.heldout:
            compared, judged = Seen.of(program, target, notes.heldout).halves()
        if not all(seen.energy for seen in (train, compared, judged) if seen is not None):
            return Miss("the attention adds nothing to its output, or there are too few held-out "
                        "tokens to choose by one half of them and judge by the other",
                        target.node)  # fmt: skip
        count = share_of_heads(target, self.active)
        found = routers(train, count, int(self.shared * count + 1e-9))
        losses = {name: compared.lost(made, compared.scores(made)) for name, made in found.items()}
        best = {kind: _best(losses, kind) for kind in ("norm", "linear") if _best(losses, kind)}
        wanted = [name for kind, name in best.items() if self.router in ("best", kind)]
        name = min(wanted, key=losses.__getitem__)
        pick = found[name]

        def edit(copy: Program) -> None:
            install(copy, target, pick)

        evidence = {"residual": train.lost(pick, train.scores(pick))}
        evidence |= {f"compared_{kind}": losses[best[kind]] for kind in best}
        if judged is not None:
            evidence |= _heldout(judged, pick, {kind: found[name] for kind, name in best.items()},
                                 found["fixed"])  # fmt: skip
        return Edit(graph=edit, note=_note(program, target, name, pick), evidence=evidence)

    def _refused(self, site: Site, program: Program, notes: Notes) -> Miss | None:
        if not (0 < self.active <= 1 and 0 <= self.shared < 1):
            return Miss("active and shared are shares, shared below 1", site.node)
        path = site.out
        if path is None or not program.has(path.projection):
            why = site.missing.get("out", "an earlier rewrite took it away")
            return Miss(f"the output projection was not found: {why}", site.node)
        spec = program.spec(site)
        if path.channels.numel() != spec.heads * spec.v_dim:
            return Miss("the output projection has factors, none of whose columns is a head's",
                        path.projection)  # fmt: skip
        if gate_of(program.node(site.node)) is not None:
            return Miss("its heads are routed already", site.node)
        miss = no_choice(site, self.active, notes)
        if miss is not None:
            return miss
        if self.router == "linear" and input_of(program, site) is None:
            return Miss("the queries are no function of one [batch, seq, width] input", site.node,
                        help="route_heads{router=norm}")  # fmt: skip
        return None


def _best(losses: Mapping[str, float], kind: str) -> str:
    """The router of a kind that loses least; empty where there is none."""
    return min((n for n in losses if n.startswith(kind)), key=losses.__getitem__, default="")


def _heldout(
    judged: Seen, pick: Router, kinds: Mapping[str, Router], fixed: Router
) -> dict[str, float]:
    """Shares of the attention's output energy that are lost on held-out data that chose nothing:
    with the router that is written, with the best of each kind, with the same heads `fixed` for all
    tokens, and with those that each token would choose."""
    found = {
        "heldout": judged.lost(pick, judged.scores(pick)),
        "heldout_fixed": judged.lost(fixed, judged.scores(fixed)),
        "heldout_least": least(judged, pick.count, pick.shared, pick.rest),
    }
    each = {f"heldout_{kind}": judged.lost(r, judged.scores(r)) for kind, r in kinds.items()}
    return found | each


def _note(program: Program, site: Site, name: str, router: Router) -> str:
    kind = "the norms of queries" if name == "norm" else "a linear router"
    kind_of_mask = program.spec(site).mask.kind  # a later rewrite's
    causal = kind_of_mask != "window" and "causal" in (site.mask.partition("+")[0], kind_of_mask)
    where = "where a decoder holds all keys, reads of them in a step of one sequence"
    saved = f"{where}, nothing elsewhere" if causal else "nothing"
    return (f"{router.count} of {site.kv_heads} key/value heads run for a token, "
            f"{int(router.shared.sum())} of them always, by {kind}; saves {saved}; experimental "
            "without healing")  # fmt: skip
