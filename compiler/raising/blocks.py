"""Residual sublayers found from the graph alone: no module name is read to find them.

A residual sublayer is a sum `exit = entry + f(entry)`. Two facts of the dataflow graph show
one, and each is enough:

- the sum *post-dominates* an operand that has other users: whatever else reads that operand flows
  into the sum, so the other terms are functions of it (masks and rotary tables do no harm);
- an operand *dominates* another term: everything that the term takes from the model's input passes
  through that operand (also where a longer skip connection breaks the first fact).

Sums of several terms are read as one (parallel attention and MLP: `x + attn(x) + mlp(x)`), a scale
on any term is allowed, and so is a norm after the sum (post-norm). A branch without a projection
(the polynomial inside a GELU) is not a sublayer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import networkx as nx
import torch
from torch import Tensor, fx

from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Program
from attnopt.compiler.raising.anchor import SDPA, SOFTMAX
from attnopt.compiler.raising.projections import projection
from attnopt.compiler.site import Sublayer

aten = torch.ops.aten
Kind = Literal["attention", "mlp", "other"]
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_SCALES = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.to.dtype,
           aten._to_copy.default, aten.type_as.default, aten.to.dtype_layout)  # fmt: skip
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default)
_CONVOLUTIONS = tuple(
    getattr(aten, name).default for name in ("conv1d", "conv2d", "conv3d", "convolution")
)
_SOURCE, _SINK = "the inputs", "the outputs"  # ends of the graph under the dominators


@dataclass(frozen=True)
class _Branch:
    """One candidate: `exit` adds `branch`; `region` are the nodes from `entry` to `branch`."""

    entry: fx.Node
    branch: fx.Node
    exit: fx.Node
    region: frozenset[fx.Node]
    kind: Kind


def sublayers(program: Program) -> tuple[Sublayer, ...]:
    """The residual sublayers in order of their branches; empty for a model without residuals.

    Takes time linear in the graph; the inside of nested skip connections is walked once per level.
    """
    flow = _Flow(program.graph)
    found = [branch for total in flow.sums() for branch in _branches(flow, total)]
    kept = sorted(_one_level(found), key=lambda item: flow.index[item.branch])
    return tuple(_named(program, kept))


def carried(program: Program, before: Sequence[Sublayer]) -> tuple[Sublayer, ...]:
    """The sublayers of a rewritten program under the ids they had before the rewrite.

    A removed sublayer changes what its neighbours are attached to, so entries and exits are found
    anew; a sublayer is the one it was as long as its branch node is. What is not found any more,
    but has all its nodes, stays as it was.
    """
    fresh = {layer.branch: layer for layer in sublayers(program)}
    names = {node.name for node in program.graph.nodes}
    kept: list[Sublayer] = []
    for old in before:
        new = fresh.get(old.branch)
        if new is not None:
            kept.append(replace(new, id=old.id, kind=old.kind, block=old.block, module=old.module))
        elif {old.entry, old.branch, old.exit} <= names:
            kept.append(old)
    return tuple(kept)


class _Flow:
    """The dataflow between tensors of a graph, with its dominators. Sizes are no dataflow."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = [n for n in graph.nodes if n.op != "output" and _is_data(n)]
        self.index = {node: at for at, node in enumerate(self.nodes)}
        self.static = _static(self.nodes)
        self._graph = nx.DiGraph()
        for node in self.nodes:
            if node not in self.static:
                self._graph.add_edges_from((a, node) for a in self.inputs(node))
        self._after = self._post_dominators(graph)
        self._before = self._dominators()

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that a node reads and that depend on the model's inputs or on sizes."""
        return [a for a in node.all_input_nodes if a in self.index and a not in self.static]

    def sums(self) -> Iterator[fx.Node]:
        """The last add of each sum of equally shaped tensors."""
        for node in self.nodes:
            if is_sum(node) and self._inside(node) is None:
                yield node

    def terms(self, total: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """The terms of a sum, each with the add that reads it."""
        found: list[tuple[fx.Node, fx.Node]] = []
        stack = [total]
        while stack:
            add = stack.pop()
            for term in add.all_input_nodes:
                if is_sum(term) and self._inside(term) is add:
                    stack.append(term)
                else:
                    found.append((term, add))
        return found

    def entry(self, total: fx.Node, terms: Sequence[fx.Node]) -> fx.Node | None:
        """The term, its scale taken off, that the other terms are functions of."""
        for term in sorted(terms, key=lambda t: self.index.get(t, 0)):
            for root in self._unscaled(term):
                others = [t for t in terms if t is not term]
                if self._post_dominated(root, total):
                    return root
                if any(self._dominates(root, other) for other in others):
                    return root
        return None

    def region(self, entry: fx.Node, branch: fx.Node) -> frozenset[fx.Node] | None:
        """The nodes after `entry` that `branch` needs; None when it does not need `entry`."""
        start, reached, seen = self.index[entry], False, {branch}
        stack = [branch]
        while stack:
            for node in self.inputs(stack.pop()):
                reached |= node is entry
                if self.index[node] > start and node not in seen:
                    seen.add(node)
                    stack.append(node)
        return frozenset(seen) if reached and branch is not entry else None

    def _inside(self, node: fx.Node) -> fx.Node | None:
        """The sum that a sum is only a part of."""
        user = next(iter(node.users), None)
        return user if len(node.users) == 1 and user is not None and is_sum(user) else None

    def _unscaled(self, term: fx.Node) -> Iterator[fx.Node]:
        while term in self.index and term not in self.static:
            yield term
            live = self.inputs(term)
            if term.target not in _SCALES or len(live) != 1:
                return
            term = live[0]

    def _post_dominated(self, node: fx.Node, total: fx.Node) -> bool:
        if sum(user in self._graph for user in node.users) < 2:
            return False
        after = self._after.get(node)
        while isinstance(after, fx.Node) and after is not total and is_sum(after):
            after = self._inside(after)  # the dominator may be an inner add of the same sum
        return after is total

    def _dominates(self, node: fx.Node, other: fx.Node) -> bool:
        at: Any = other
        while isinstance(at, fx.Node) and self.index[at] > self.index[node]:
            at = self._before.get(at)
        return at is node and other is not node

    def _post_dominators(self, graph: fx.Graph) -> dict[Any, Any]:
        backwards = self._graph.reverse()
        (output,) = (node for node in graph.nodes if node.op == "output")
        ends = [node for node in output.all_input_nodes if node in self._graph]
        # An output that also feeds a later one (hidden states, keys, values) ends no flow.
        last = [node for node in ends if not any(user in self._graph for user in node.users)]
        backwards.add_edges_from((_SINK, node) for node in last or ends)
        return dict(nx.immediate_dominators(backwards, _SINK)) if ends else {}

    def _dominators(self) -> dict[Any, Any]:
        """Dominators seen from the input that most of the graph reads: masks do not count."""
        inputs = [n for n in self.nodes if n.op == "placeholder" and n in self._graph]
        if not inputs:
            return {}
        root = max(inputs, key=lambda n: len(nx.descendants(self._graph, n)))
        return dict(nx.immediate_dominators(self._graph, root))


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two floating-point tensors of one shape, as residuals do."""
    if node.target not in _ADDS or len(node.all_input_nodes) != 2:
        return False
    if node.kwargs.get("alpha", 1) != 1:
        return False
    values = [item.meta.get("val") for item in (node, *node.all_input_nodes)]
    sums = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    shapes = [[str(size) for size in value.shape] for value in sums]
    return len(shapes) == 3 and len(shapes[0]) >= 2 and shapes[0] == shapes[1] == shapes[2]


def _is_data(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, Tensor) for item in value)
    return isinstance(value, Tensor) or node.op == "get_attr"


def _static(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Parameters, and what is computed from parameters alone."""
    found: set[fx.Node] = set()
    for node in nodes:
        reads = node.all_input_nodes
        if node.op == "get_attr" or (reads and all(a in found for a in reads)):
            found.add(node)
    return found


def _branches(flow: _Flow, total: fx.Node) -> Iterator[_Branch]:
    pairs = flow.terms(total)
    entry = flow.entry(total, [term for term, _ in pairs])
    if entry is None:
        return
    for term, add in pairs:
        if term not in flow.index or term in flow.static or entry in flow._unscaled(term):
            continue
        region = flow.region(entry, term)
        if region is None:
            continue
        weighted = sum(projection(node) is not None for node in region)
        convolved = any(node.target in _CONVOLUTIONS for node in region)
        if not weighted and not convolved:
            continue
        attends = any(_attends(node) for node in region)
        kind: Kind = "attention" if attends else "mlp" if weighted >= 2 else "other"
        yield _Branch(entry, term, add, region, kind)


def _attends(node: fx.Node) -> bool:
    if node.target is ATTENTION or node.target is SDPA:
        return True
    return node.target in SOFTMAX and _weighs_values(node)


def _weighs_values(softmax: fx.Node) -> bool:
    """Whether a softmax's result is multiplied with another activation (a router's is not)."""
    node: fx.Node | None = softmax
    for _ in range(6):
        assert node is not None
        for user in node.users:
            if user.target in _PRODUCTS:
                return all(item.op != "get_attr" for item in user.all_input_nodes)
        node = next((u for u in node.users if len(u.all_input_nodes) == 1), None)
        if node is None:
            return False
    return False


def _one_level(found: Sequence[_Branch]) -> list[_Branch]:
    """Of nested candidates keep one level: one that holds whole blocks goes, else what it holds."""
    by_exit: dict[fx.Node, list[_Branch]] = {}
    for item in found:
        by_exit.setdefault(item.exit, []).append(item)
    dropped: set[int] = set()
    for item in sorted(found, key=lambda b: len(b.region)):
        inside = [b for node in item.region for b in by_exit.get(node, ()) if b is not item]
        inside = [b for b in inside if id(b) not in dropped and b.branch in item.region]
        is_stage = len(inside) > 1 and any(b.kind == "attention" for b in inside)
        dropped.update([id(item)] if is_stage else map(id, inside))
    return [item for item in found if id(item) not in dropped]


def _named(program: Program, kept: Sequence[_Branch]) -> Iterator[Sublayer]:
    attentions = 0
    taken: dict[str, int] = {}
    for item in kept:
        attentions += item.kind == "attention"
        block = max(0, attentions - 1)
        base = f"b{block}.{item.kind}"
        taken[base] = taken.get(base, 0) + 1
        inner = _only_here(item)
        names = {node.name for node in inner}
        yield Sublayer(
            id=base if taken[base] == 1 else f"{base}{taken[base]}",
            kind=item.kind,
            block=block,
            module=_module(program, item),
            entry=item.entry.name,
            branch=item.branch.name,
            exit=item.exit.name,
            inner=tuple(node.name for node in program.graph.nodes if node in inner),
            sites=tuple(site.id for site in program.sites if site.node in names),
        )


def _only_here(item: _Branch) -> set[fx.Node]:
    """The nodes that are dead without the branch: only they and the exit's add read them."""
    if len(item.branch.users) > 1:
        return set()
    inner = {item.branch}
    waiting = [item.branch]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node is item.entry or node in inner or node.op == "placeholder":
                continue
            if all(user in inner for user in node.users):
                inner.add(node)
                waiting.append(node)
    return inner


def _module(program: Program, item: _Branch) -> str:
    """The deepest module that holds the branch's projections and attention, without the prefix."""
    main = [n for n in item.region if _attends(n) or projection(n) is not None]
    paths = [path for path in map(_path, main or item.region) if path is not None]
    common = list(paths[0]) if paths else []
    for path in paths[1:]:
        same = [a == b for a, b in zip(common, path, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    return ".".join(common).removeprefix(program.prefix)


def _path(node: fx.Node) -> list[str] | None:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    deepest = list(stack.values())[-1][0]
    return [part for part in str(deepest).split(".") if part]
