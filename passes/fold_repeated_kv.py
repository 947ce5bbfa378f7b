"""Let grouped query heads read the key/value heads directly, instead of copies of them.

A model with grouped-query attention (Ainslie et al., GQA, arXiv:2305.13245, section 2.2) repeats
each key/value head for the query heads of its group before a plain attention. The copies are found
by what they compute: numbers that name every element are put at a candidate node, and read at the
attention's operand. If head h there is head h // r of the candidate, the attention is given the
candidate and a spec with r times fewer key/value heads, which is the same function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass
from attnopt.compiler.program import Program
from attnopt.compiler.raising.evaluate import Evaluator, Unknown, concrete, example_sizes
from attnopt.compiler.site import Site

STEPS = 10  # operators between the heads of a projection and their copies, at most


@dataclass(frozen=True)
class FoldRepeatedKV(Pass):
    """Read key/value heads through `spec.kv_heads`, without their copies."""

    name: ClassVar[str] = "fold_repeated_kv"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    source: ClassVar[str] = "Ainslie et al. 2023, GQA, arXiv:2305.13245"

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """Give the attention the heads before they are repeated, or say why they are not folded."""
        node = program.node(target.node)
        spec = program.spec(target)
        found = {n: originals(program, node, n) for n in (1, 2)}
        shared = sorted(set(found[1]) & set(found[2]))
        if not shared:
            return Miss(_why(found, spec.kv_heads), at=target.node)
        heads = shared[0]
        made = spec.with_(kv_heads=heads)
        names = [found[n][heads].name for n in (1, 2)]

        def edit(copy: Program) -> None:
            at = copy.node(target.node)
            k, v = (_cast(copy, name, at) for name in names)
            at.args = (at.args[0], k, v, at.args[3], made.text)

        site = replace(target, spec=made, kv_heads=heads)
        times = spec.kv_heads // heads
        return Edit(
            graph=edit,
            sites={target.id: site},
            note=f"dropped {times}-fold copies of {heads} heads",
        )


def originals(program: Program, attention: fx.Node, operand: int) -> dict[int, fx.Node]:
    """Nodes upstream of an operand of which it is a grouped repeat: number of heads -> node [batch,
    heads, T, dim]. What lies behind a cast is taken only where the copies themselves are cast, and
    only to their own dtype or to such as hold all that lies there.
    """
    copies = attention.args[operand]
    assert isinstance(copies, fx.Node)
    found: dict[int, fx.Node] = {}
    at: fx.Node = copies
    way = set[torch.dtype]()
    for _ in range(STEPS):
        inputs = [n for n in at.all_input_nodes if _is_data(n)]
        if at.op != "call_function" or not inputs or inputs[0] is not at.args[0]:
            break
        way.add(_dtype(at))
        at = inputs[0]
        heads = _fewer_heads(at, copies)
        rounded = any(torch.promote_types(_dtype(at), x) != x for x in way - {_dtype(copies)})
        if rounded or (heads in found and _dtype(at) != _dtype(copies)):
            break
        if heads and _repeats(program, at, copies, heads):
            found[heads] = at
    return found


def _cast(program: Program, name: str, attention: fx.Node) -> fx.Node:
    """A node by its name, in the dtype of the queries."""
    node, dtype = program.node(name), cast(fx.Node, attention.args[0]).meta["val"].dtype
    if node.meta["val"].dtype == dtype:
        return node
    return program.call(torch.ops.aten.to.dtype, (node, dtype), before=attention)


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _is_data(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _fewer_heads(candidate: fx.Node, copies: fx.Node) -> int:
    """The number of heads of a candidate that could have been repeated into `copies`, or 0."""
    a, b = candidate.meta["val"].shape, copies.meta["val"].shape
    if (
        len(a) != 4
        or len(b) != 4
        or isinstance(a[1], torch.SymInt)
        or isinstance(b[1], torch.SymInt)
    ):
        return 0
    fits = a[3] == b[3] and a[1] < b[1] and b[1] % a[1] == 0
    return int(a[1]) if fits else 0


def _repeats(program: Program, candidate: fx.Node, copies: fx.Node, heads: int) -> bool:
    sizes = _small(program)
    try:
        shape = [concrete(size, sizes) for size in candidate.meta["val"].shape]
        named = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape)
        seen = Evaluator(program, sizes, {candidate: named})(copies)
    except Unknown:
        return False
    times = int(copies.meta["val"].shape[1]) // heads
    return torch.equal(seen.to(torch.float64), named.repeat_interleave(times, 1).to(torch.float64))


def _small(program: Program) -> dict[str, int]:
    """Sizes to probe at: 2 for every symbol of the batch's size in the example, 3 for the
    others.
    """
    sizes = example_sizes(program)
    values = sorted(set(sizes.values()))
    return {name: 2 + values.index(size) for name, size in sizes.items()}


def _why(found: dict[int, dict[int, fx.Node]], heads: int) -> str:
    if found[1] or found[2]:
        return "only one of keys and values is repeated from fewer heads"
    return f"its {heads} key/value heads are not copies of fewer"
