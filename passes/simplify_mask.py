"""Replace a mask that the model materialises as a tensor by its class, where the class is proved.

A mask tensor [batch, heads, S, T] costs S T reads per head and hides that, say, half of it is never
kept. Where it equals a class (full, causal, window, window with sinks) and a padding of keys for
every length and every input, the class goes into the spec and the padding stays as one truth value
per key, `[batch, T]`. Logits that the model adds besides (a relative bias) stay.

The rewrite is exact: a dropped logit becomes what it was, -inf or the lowest number, so a query
whose keys are all dropped gives zeros or the mean over all keys as before. Adding the lowest number
of float32 to a logit gives that number again, because half its spacing there, 1e31, is larger than
any logit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from attnopt.compiler.contract import Edit, Exactness, Miss, Notes, Pass
from attnopt.compiler.program import Program
from attnopt.compiler.raising.mask import classify
from attnopt.compiler.raising.mask_facts import MaskFacts, Test
from attnopt.compiler.site import Site
from attnopt.compiler.spec import AttentionSpec, parse_spec

aten = torch.ops.aten
_SCALAR = {
    "ne": aten.ne.Scalar, "eq": aten.eq.Scalar, "lt": aten.lt.Scalar, "le": aten.le.Scalar,
    "gt": aten.gt.Scalar, "ge": aten.ge.Scalar,
}  # fmt: skip

_MARK = "attnopt_shared"  # in the meta of nodes that this pass put below the inputs


@dataclass(frozen=True)
class SimplifyMask(Pass):
    """Turn the extras `keep` and `bias` into the spec's mask and the extra `padding`."""

    name: ClassVar[str] = "simplify_mask"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    source: ClassVar[str] = "difference constraints, Cormen et al., Introduction to Algorithms"

    def rewrite(self, target: Site, program: Program, notes: Notes) -> Edit | Miss:
        """Give the site's spec with its mask as a class, or say what stood in the way of a
        proof.
        """
        node = program.node(target.node)
        spec = program.spec(target)
        if not set(spec.extras) - {"padding", "sinks"}:
            return Miss("no mask tensor is read", at=target.node)
        facts = classify(program, node)
        at = facts.at if facts.at and program.has(facts.at) else target.node
        if facts.reason and facts.mask is None:
            return Miss(f"the mask is a tensor of no class: {facts.reason}", at=at)
        if facts.mask is None or facts.relations:
            return Miss(f"the mask is {facts.text}, which stays a tensor", at=at)
        if facts.certainty != "proved":
            return Miss(f"the mask looks like {facts.text}, not proved: {facts.reason}", at=at)
        made = simplified(spec, facts, self_attention=_square(node))
        if _same(node, spec, made, facts):
            return Miss(f"the mask is {facts.text}: nothing in it is a class", at=target.node)
        site = replace(target, spec=made, mask=facts.text, mask_certainty="proved")
        return Edit(
            graph=lambda copy: _apply(copy, target.node, made, facts),
            sites={target.id: site},
            note=f"the mask tensor is {facts.text}",
        )


def simplified(spec: AttentionSpec, facts: MaskFacts, self_attention: bool) -> AttentionSpec:
    """The spec with its mask as proved. `self_attention` says that there are as many queries as
    keys.

    Where no query can lose all its keys the two fills are the same function, and "-inf" is taken.
    """
    assert facts.mask is not None
    extras = tuple(
        name
        for name, there in (
            ("bias", facts.bias),
            ("padding", facts.padding is not None),
            ("sinks", "sinks" in spec.extras),
        )
        if there
    )
    never_empty = facts.padding is None and (facts.mask.kind != "window" or self_attention)
    fill = "-inf" if never_empty else facts.fill
    return spec.with_(mask=facts.mask, extras=extras, fill=fill)


def _same(node: fx.Node, spec: AttentionSpec, made: AttentionSpec, facts: MaskFacts) -> bool:
    if spec != made:
        return False
    extras: Any = node.args[3]
    return "bias" not in made.extras or extras[made.extras.index("bias")].name == facts.rest


def _apply(program: Program, name: str, spec: AttentionSpec, facts: MaskFacts) -> None:
    node = program.node(name)
    extras: list[fx.Node] = []
    given: Any = node.args[3]
    sinks = [x for x, kind in zip(given, parse_spec(str(node.args[4])).extras, strict=True)
             if kind == "sinks"]  # fmt: skip
    if facts.rest is not None:
        extras.append(program.node(facts.rest))
    if facts.padding is not None:
        extras.append(_padding(program, node, program.node(facts.padding), facts.test))
    node.args = (*node.args[:3], [*extras, *sinks], spec.text)


def _padding(program: Program, attention: fx.Node, source: fx.Node, test: Test) -> fx.Node:
    """A bool node [batch, keys], True at real keys, shared by the layers."""
    first = _after_inputs(program)
    value = source.meta["val"]
    at = source
    for axis in reversed(range(value.dim())):
        if axis not in (test.batch, test.keys):
            at = _shared(program, aten.select.int, (at, axis, 0), first)
    if test.batch > test.keys:
        at = _shared(program, aten.transpose.int, (at, 0, 1), first)
    if value.dtype != torch.bool or (test.op, test.value) != ("ne", 0):
        at = _shared(program, _SCALAR[test.op], (at, test.value), first)
    k: Any = attention.args[1]
    wanted = (k.meta["val"].shape[0], k.meta["val"].shape[2])
    if all(_known_equal(a, b) for a, b in zip(at.meta["val"].shape, wanted, strict=True)):
        return at
    return _cut(program, k, at, wanted, first)


def _cut(
    program: Program, k: fx.Node, padding: fx.Node, wanted: tuple[Any, Any], first: fx.Node
) -> fx.Node:
    """The padding at the batch rows and key positions that the attention has, as the model's own
    mask reads it.
    """
    rows, keys = (
        _size(program, k, dim, size, first) for dim, size in zip((0, 2), wanted, strict=True)
    )
    batch, positions = (_arange(program, size, padding, first) for size in (rows, keys))
    column = _shared(program, aten.unsqueeze.default, (batch, 1), first)
    return _shared(program, aten.index.Tensor, (padding, [column, positions]), first)


def _size(program: Program, k: fx.Node, dim: int, size: Any, first: fx.Node) -> Any:
    """A node that holds one of k's sizes, read off an input so that layers share it."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, Tensor):
            continue
        for axis, other in enumerate(value.shape):
            if _known_equal(size, other):
                return _shared(program, aten.sym_size.int, (node, axis), first)
    raise AssertionError(f"no input has the size {size} of `{k.name}`")


def _arange(program: Program, size: Any, like: fx.Node, first: fx.Node) -> fx.Node:
    """0 .. size - 1 on the device of another node."""
    ones = _shared(program, aten.new_ones.default, (like, [size]), first, dtype=torch.int64)
    ends = _shared(program, aten.cumsum.default, (ones, 0), first)
    return _shared(program, aten.sub.Tensor, (ends, 1), first)


def _after_inputs(program: Program) -> fx.Node:
    """The first node below the inputs and below what this pass has put there."""
    nodes = list(program.graph.nodes)
    last = max(n for n, node in enumerate(nodes) if node.op == "placeholder")
    found: fx.Node = next(node for node in nodes[last + 1 :] if _MARK not in node.meta)
    return found


def _shared(
    program: Program, target: Any, args: tuple[Any, ...], first: fx.Node, **kwargs: Any
) -> fx.Node:
    """A node right below the inputs that computes this; the one that is there already, if it is."""
    for node in program.graph.nodes:
        if node is first:
            break
        if node.target is target and node.args == args and dict(node.kwargs) == kwargs:
            found: fx.Node = node
            return found
    made = program.call(target, args, first, **kwargs)
    made.meta[_MARK] = True
    return made


def _square(node: fx.Node) -> bool:
    q, k = (node.args[n].meta["val"].shape[2] for n in (0, 1))  # type: ignore[union-attr]
    return _known_equal(q, k)


def _known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or the same symbol, without adding a guard."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt) and a == b
