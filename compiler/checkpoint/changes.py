"""What became of a model's attentions and sublayers, read from its program before and after a
plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from attnopt.compiler.checkpoint.names import read_names
from attnopt.compiler.contract import Exactness, read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.plan import Outcome
from attnopt.compiler.program import Program
from attnopt.compiler.raising.projections import Projection, projection
from attnopt.compiler.site import Site, Sublayer
from attnopt.compiler.spec import Mask

# The approximate rewrites that are understood here; exact and guarded ones change no function.
EXPRESSED = (
    "merge_kv_heads", "prune_heads", "shrink_head_dim", "sliding_window", "skip_sublayers",
    "fuse_blocks", "latent_kv", "refit", "heal",
)  # fmt: skip
# Why the others are not, as far as that is known here.
_NOT_YET = {
    "route_heads": "no family has a router over its heads",
    "low_rank_projections": "no family has two products in the place of a projection",
    "compress_attention": "the family has no latent that queries, keys and values are made of",
    "share_kv_layers": "the shared keys are made of what an earlier layer reads: no config says "
    "that of neighbouring layers, and the same weights in the later layer would make other keys",
}


@dataclass(frozen=True)
class Pair:
    """One attention before and after the plan; `window` is the mask that the plan gave it."""

    before: Site
    after: Site
    window: Mask | None = None


@dataclass(frozen=True)
class Removed:
    """A sublayer that adds nothing any more; `last` is the projection that its branch ended in."""

    layer: Sublayer
    own: frozenset[str]
    last: Projection | None


@dataclass(frozen=True)
class Changes:
    """All that the plan did to the function, and `kept`: the names of the rewrites of which there
    is nothing to write."""

    original: Program
    program: Program
    pairs: tuple[Pair, ...]
    removed: tuple[Removed, ...]
    kept: tuple[str, ...] = ()


def refusal(what: str, where: str = "", why: str = "", help: str = "") -> Problem:
    """The `Problem` A521: a plan that no checkpoint of the family can hold."""
    told = "leave the rewrite out of the plan, or use the run's own model.pt2"
    return Problem("A521", what, where=where, why=why, help=help or told)


def changes(original: Program, program: Program, outcomes: Iterable[Outcome]) -> Changes:
    """Read the changes of a plan from its two programs.

    Raises `Problem` A521 for rewrites that are not known here, for heads of one attention that go
    different ways, and for a sublayer that was replaced by something else.
    """
    applied = [outcome for outcome in outcomes if outcome.applied]
    kept = kept_out(applied)
    windowed = {o.target for o in applied if read_pass(o.rewrite).name == "sliding_window"}
    after = {site.id: site for site in program.sites}
    for id in after.keys() - {site.id for site in original.sites}:
        raise _split(original, id)
    pairs = tuple(
        Pair(
            site, after[site.id],
            program.spec(after[site.id]).mask if site.id in windowed else None,
        )
        for site in original.sites
        if site.id in after
    )  # fmt: skip
    return Changes(original, program, pairs, _removed(original, program), kept)


def kept_out(outcomes: Iterable[Outcome]) -> tuple[str, ...]:
    """The applied rewrites of which there is nothing to write, by name.

    Raises `Problem` A521 for one that changes the function in a way that is not known here.
    """
    names = dict[str, None]()
    for outcome in (outcome for outcome in outcomes if outcome.applied):
        made = read_pass(outcome.rewrite)
        if made.exactness is not Exactness.APPROXIMATE:
            names[made.name] = None
        elif made.name not in EXPRESSED:
            plain = f"no config of transformers is written for it yet; {', '.join(EXPRESSED)} are"
            raise refusal(
                f"`{made.name}` cannot be written as a plain checkpoint",
                where=outcome.target, why=_NOT_YET.get(made.name, plain),
            )  # fmt: skip
    return tuple(names)


def _split(original: Program, id: str) -> Problem:
    base = id.rpartition(".")[0]
    site = next((site for site in original.sites if site.id == base), None)
    return refusal(
        "the heads of one attention read different keys",
        where=site.module if site else id,
        why="the config of a family describes all heads of an attention at once",
        help="give all heads the window: sliding_window without `groups` and `kept`",
    )


def _removed(original: Program, program: Program) -> tuple[Removed, ...]:
    read, left = read_names(program), {site.id for site in program.sites}
    found = []
    for layer in original.sublayers:
        replaced = program.has(layer.exit) and not program.has(layer.branch)
        if replaced and _adds_something_else(original, program, layer):
            raise refusal(
                f"the {layer.kind} sublayer {layer.id} is replaced by a linear map",
                where=layer.module,
                why="no family has a linear map in the place of a sublayer",
                help="delete it instead: skip_sublayers{method=delete}",
            )
        own = _own(original, layer)
        if not own or own & read or left & set(layer.sites):
            continue
        found.append(Removed(layer, frozenset(own), _last(original, layer)))
    return tuple(found)


def _own(program: Program, layer: Sublayer) -> set[str]:
    """The parameters that only this sublayer reads."""
    inner = {node for node in program.graph.nodes if node.name in set(layer.inner)}
    read = {
        node: [user for user in node.users if user not in inner]
        for node in program.graph.nodes
        if node.op == "get_attr" and any(user in inner for user in node.users)
    }
    shared = {str(node.target) for node, others in read.items() if others}
    return {str(node.target) for node in read} - shared


def _adds_something_else(original: Program, program: Program, layer: Sublayer) -> bool:
    """Whether the sum that the branch went into reads a projection with a weight that the original
    has not, and that is no attention's."""
    sites = [path for s in program.sites for path in (s.q, s.k, s.v, s.out) if path is not None]
    known = read_names(original) | {path.weight for path in sites}
    stack, seen = [program.node(layer.exit)], set[fx.Node]()
    while stack:
        node = stack.pop()
        made = projection(node)
        if made is not None and made.weight not in known:
            return True
        if made is None and node.name != layer.entry:
            stack += [source for source in node.all_input_nodes if source not in seen]
        seen.add(node)
    return False


def _last(program: Program, layer: Sublayer) -> Projection | None:
    """The projection that everything in the branch passes through last; None where there is none
    (an MLP of several experts), or its weight is read elsewhere too."""
    inner = set(layer.inner)
    nodes = [node for node in program.graph.nodes if node.name in inner]
    made = next(filter(None, (projection(node) for node in reversed(nodes))), None)
    if made is None:
        return None
    stack, seen = [program.node(layer.branch)], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node is made.node or node in seen:
            continue
        if node.name == layer.entry or projection(node) is not None:
            return None
        seen.add(node)
        stack += [x for x in node.all_input_nodes if x.name in inner or x.name == layer.entry]
    names = [name for name in (made.weight, made.bias) if name is not None]
    return made if _own(program, layer) >= set(names) else None
