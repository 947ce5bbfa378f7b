"""Split one attention of the graph into two, by key/value head, so that each part may follow a spec
of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Miss
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Program, infer
from attnopt.compiler.site import Site
from attnopt.compiler.spec import AttentionSpec

aten = torch.ops.aten


def split_heads(
    program: Program, site: Site, chosen: Sequence[int], spec: AttentionSpec
) -> Site | Miss:
    """Give the `chosen` key/value heads of a site an attention with `spec`, in this graph.

    The site keeps the other heads; a new site, with id "<id>.split", stands for the chosen ones.
    `spec` is for all heads. Answers the site with its new facts: both parts lose the paths of q, k
    and v, and the first keeps that of the output.
    """
    node = program.node(site.node)
    if len(chosen) in (0, site.kv_heads):
        return Miss("a split needs some heads on either side", site.node)
    if len(set(node.users)) == 0:
        return Miss("nothing reads the attention's result", site.node)
    own = program.spec(site)
    others = [g for g in range(site.kv_heads) if g not in chosen]
    parts = []
    for name, groups, line in (("split", chosen, spec), ("rest", others, own)):
        pick = _Pick(program, node, site, own, groups, f"{name}_{site.id}")
        small = line.with_(heads=len(pick.queries), kv_heads=len(pick.keys))
        parts.append((pick, small, (*pick.operands(), small.text)))
    (first, first_spec, first_args), (second, second_spec, second_args) = parts
    made = program.call(ATTENTION, first_args, before=node)
    readers = list(node.users)
    node.args = second_args
    infer(node)

    after = node.next
    order = torch.tensor([*first.queries, *second.queries]).argsort()
    joined = program.call(aten.cat.default, ([made, node], 1), before=after)
    place = program.parameter(f"heads_order_{_word(site.id)}", order, before=after)
    result = program.call(aten.index_select.default, (joined, 1, place), before=after)
    for reader in readers:
        reader.replace_input_with(node, result)

    why = "its heads are split between two attentions"
    missing = {**site.missing, **dict.fromkeys(("q", "k", "v"), why)}
    bare = replace(site, q=None, k=None, v=None, missing=missing)
    extra = replace(
        bare,
        id=f"{site.id}.split",
        node=made.name,
        spec=first_spec,
        kv_heads=len(chosen),
        out=None,
        mask=str(spec.mask.kind),
        missing={**missing, "out": f"it is that of {site.id}"},
    )
    program.sites = (*program.sites, extra)
    return replace(bare, spec=second_spec, kv_heads=len(others))


class _Pick:
    """The operands of one part: the query heads and key/value heads of some groups."""

    def __init__(
        self,
        program: Program,
        node: fx.Node,
        site: Site,
        spec: AttentionSpec,
        groups: Sequence[int],
        name: str,
    ) -> None:
        self.program, self.node, self.spec, self.name = program, node, spec, _word(name)
        self.queries = _members(groups, spec.heads // site.kv_heads)
        self.keys = _members(groups, spec.kv_heads // site.kv_heads)

    def operands(self) -> tuple[Any, ...]:
        """q, k, v and the extras of this part."""
        q, k, v, extras = self.node.args[:4]
        queries = self._index("q", self.queries)
        keys = self._index("kv", self.keys)
        picked = [self._take(q, queries), self._take(k, keys), self._take(v, keys)]
        return *picked, [self._extra(e, queries) for e in cast(list[fx.Node], extras)]

    def _index(self, kind: str, heads: list[int]) -> fx.Node:
        value = torch.tensor(heads, dtype=torch.long)
        return self.program.parameter(f"heads_{kind}_{self.name}", value, before=self.node)

    def _take(self, x: Any, index: fx.Node) -> fx.Node:
        return self.program.call(aten.index_select.default, (x, 1, index), before=self.node)

    def _extra(self, x: fx.Node, index: fx.Node) -> fx.Node:
        value = x.meta["val"]
        per_head = isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] != 1
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[0] != 1:
            return self.program.call(aten.index_select.default, (x, 0, index), before=self.node)
        return self._take(x, index) if per_head else x


def _members(groups: Sequence[int], size: int) -> list[int]:
    return [g * size + i for g in groups for i in range(size)]


def _word(name: str) -> str:
    return name.replace(".", "_")
