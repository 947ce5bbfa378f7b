"""The mask probe: what class the mask of one attention is, proved from the graph or else only
observed.
"""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import fx

from attnopt.compiler.program import Program
from attnopt.compiler.raising import mask_observe
from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.raising.expression import (
    Affine,
    Condition,
    Const,
    Expression,
    Where,
    both,
    leaves,
    negate,
    truth,
    variable,
    where,
)
from attnopt.compiler.raising.mask_class import Classless, Padding, decide, keep_of, prefix
from attnopt.compiler.raising.mask_facts import MaskFacts, Test, mask_text
from attnopt.compiler.raising.mask_relation import related
from attnopt.compiler.raising.symbolic import Symbolic, name_of
from attnopt.compiler.raising.symbolic_views import size_form
from attnopt.compiler.spec import AttentionSpec, Fill, Mask, parse_spec

ABSORBING = -1e30  # a float32 logit of any size that occurs, added to this, rounds to this
DROPPING = -1e4  # softmax weights of keys this far down are zero in every dtype
_WRAPPERS = {"contiguous", "clone", "alias", "detach"}


_KNOWN: weakref.WeakKeyDictionary[fx.Graph, dict[tuple[object, ...], MaskFacts]] = (
    weakref.WeakKeyDictionary()
)


def classify(program: Program, attention: fx.Node) -> MaskFacts:
    """The mask of one attention node. Masks that layers share are worked out once per graph."""
    spec = parse_spec(str(attention.args[4]))
    named = _extras(attention, spec)
    known = _KNOWN.setdefault(program.graph, {})
    shape = tuple(str(size) for n in (0, 1) for size in _shape(attention, n))
    key = (*((name, node.name) for name, node in named.items()), spec.mask, spec.fill, shape)
    if key not in known:
        known[key] = _classify(program, attention, spec, named)
    return known[key]


def _classify(
    program: Program, attention: fx.Node, spec: AttentionSpec, named: dict[str, fx.Node]
) -> MaskFacts:
    if not set(named) - {"padding"}:
        padding = named["padding"].name if "padding" in named else None
        facts = MaskFacts(spec.mask, padding, spec.fill)
        return replace(facts, text=mask_text(facts, ""))
    try:
        facts = _Probe(program, attention, spec).prove(named)
    except Classless as error:
        return MaskFacts(None, bias="bias" in named, text="tensor", reason=str(error))
    except Unknown as error:
        reason = str(error)
        facts = mask_observe.observe(program, attention, spec, named)
        return replace(facts, certainty="observed", reason=reason, at=_guilty(reason))
    kind = ""
    if facts.rest is not None:
        kind = mask_observe.bias_kind(program, attention, program.node(facts.rest))
    if facts.mask is None:  # understood, and none of the classes that a spec names
        return replace(facts, text="+".join((facts.text, *([kind] if kind else []))))
    return replace(facts, text=mask_text(facts, kind))


class _Probe:
    """The proof for one attention: its extras as one condition on (i, j), decided."""

    def __init__(self, program: Program, attention: fx.Node, spec: AttentionSpec) -> None:
        q, k = _shape(attention, 0), _shape(attention, 1)
        extents = {"b": q[0], "h": q[1], "i": q[2], "j": k[2]}
        self.symbolic = Symbolic(program, extents)
        self.sizes = (size_form(q[2]), size_form(k[2]))
        self.program, self.attention, self.spec = program, attention, spec
        self.conditions: list[Condition] = []
        self.fills: set[Fill] = set()
        self.soft = 0.0
        self.lowest = 0
        self.sum = ""

    def prove(self, named: dict[str, fx.Node]) -> MaskFacts:
        rest: fx.Node | None = None
        self.conditions.append(keep_of(self.spec.mask))
        if self.spec.mask.kind == "window" or "keep" in named or "padding" in named:
            self.fills.add(self.spec.fill)
        for name in ("keep", "padding"):
            if name in named:
                self.conditions.append(truth(self._element(named[name], name == "padding")))
        if "bias" in named:
            rest = self._bias(named["bias"])
        if len(self.fills) > 1:
            raise Unknown("it drops some keys by -inf and others by the lowest number")
        keep, relations = related(both(*self.conditions))
        besides = [relation.holds for relation in relations]
        words = tuple(str(relation) for relation in relations)
        try:
            mask, padding = decide(keep, self.sizes, besides)
        except Classless:
            found = prefix(keep, self.sizes, besides)
            if found is None:
                raise
            text = "+".join((found[0], *words, *(["padding"] if found[1] else [])))
            return MaskFacts(None, bias=rest is not None, text=text, relations=words)
        if self.soft and (padding is not None or not self._never_empty(mask)):
            raise Unknown(
                f"it drops keys by {self.soft:g}, which leaves a query without keys its scores"
            )
        if self.sum and (padding is not None or not self._never_empty(mask)):
            raise Unknown(f"`{self.sum}` adds two lowest numbers, which is below the lowest")
        facts = MaskFacts(mask, fill=next(iter(self.fills), "-inf"), relations=words)
        if padding is not None:
            facts = replace(facts, padding=padding.datum.name, test=_test(padding))
        return replace(facts, bias=rest is not None, rest=rest.name if rest is not None else None)

    def _never_empty(self, mask: Mask) -> bool:
        return mask.kind in ("full", "causal") or self.sizes[0] == self.sizes[1]

    def _element(self, node: fx.Node, keys_only: bool = False) -> Expression:
        names = ("b", "j") if keys_only else ("b", "h", "i", "j")
        rank = node.meta["val"].dim()
        return self.symbolic.at(node, tuple(variable(n) for n in names[len(names) - rank :]))

    def _bias(self, node: fx.Node) -> fx.Node | None:
        """Take the dropping part out of an additive mask; what is left of it, or None."""
        try:
            self._drop(self._element(node))
            return None
        except Unknown:
            if not self._splits(node):
                return self._real(node)
        name = name_of(node)
        if name in _WRAPPERS:
            return self._bias(node.args[0])  # type: ignore[arg-type]
        if name == "add":
            return self._sum(node)
        if name == "masked_fill":
            dropped, value, kept = node.args[1], node.args[2], node.args[0]
            condition: Expression = negate(self._element(dropped))  # type: ignore[arg-type]
        else:
            chosen, yes, no = node.args
            flipped = _dropping(yes) is not None
            value, kept = (yes, no) if flipped else (no, yes)
            condition = self._element(chosen)  # type: ignore[arg-type]
            condition = negate(condition) if flipped else condition
        drop = _dropping(value)
        assert drop is not None
        self._keep(truth(condition), drop, node.meta["val"].dtype)
        return self._bias(kept) if isinstance(kept, fx.Node) else None

    def _real(self, node: fx.Node) -> fx.Node:
        """A bias that stays a tensor. Raises Unknown, with what hid its mask, when it also drops
        keys.
        """
        if not mask_observe.drops(self.program, self.attention, node):
            return node
        _split(self._element(node))
        raise Unknown(f"`{node.name}` adds real numbers and drops keys")

    def _splits(self, node: fx.Node) -> bool:
        """Whether a real-valued additive mask can be taken apart here."""
        name = name_of(node)
        mutable = getattr(getattr(node.target, "_schema", None), "is_mutable", False)
        if node.op != "call_function" or mutable:
            return False
        if name == "where":
            return any(_dropping(x) is not None for x in node.args[1:3])
        if name == "masked_fill":
            return _dropping(node.args[2]) is not None
        if name == "add":
            return all(isinstance(x, fx.Node) for x in node.args) and self._masks(node) is not None
        return name in _WRAPPERS

    def _masks(self, node: fx.Node) -> int | None:
        """Which operand of a sum is a mask that only drops keys."""
        for place in (0, 1):
            try:
                _split(self._element(node.args[place]))  # type: ignore[arg-type]
            except Unknown:
                continue
            return place
        return None

    def _sum(self, node: fx.Node) -> fx.Node | None:
        place = self._masks(node)
        assert place is not None
        counts = [self.lowest]
        self._drop(self._element(node.args[place]))  # type: ignore[arg-type]
        counts.append(self.lowest)
        rest = self._bias(node.args[1 - place])  # type: ignore[arg-type]
        if counts[0] < counts[1] < self.lowest:
            self.sum = node.name  # two lowest numbers are -inf, one alone is not
        return rest

    def _drop(self, x: Expression) -> None:
        condition, drop = _split(x)
        if drop is not None:
            self._keep(condition, drop, None)

    def _keep(self, condition: Condition, drop: float, dtype: torch.dtype | None) -> None:
        lowest = ABSORBING if dtype != torch.float16 else torch.finfo(torch.float16).min
        self.conditions.append(condition)
        if drop == float("-inf"):
            self.fills.add("-inf")
        elif drop <= lowest or drop == torch.finfo(torch.float16).min:
            self.fills.add("min")
            self.lowest += 1
        else:
            self.soft = drop
            self.fills.add("-inf")


def _split(x: Expression) -> tuple[Condition, float | None]:
    """An additive mask as the condition under which it adds nothing, and what it adds otherwise."""
    drops = set()
    for leaf in leaves(x):
        value = _value(leaf)
        if value is None or (value != 0 and value > DROPPING):
            raise Unknown("it adds more than zero or a dropping number to the scores")
        if value != 0:
            drops.add(value)
    if len(drops) > 1:
        raise Unknown(f"it drops keys by different numbers {sorted(drops)}")
    return truth(_zero(x)), next(iter(drops), None)


def _zero(x: Expression) -> Expression:
    if isinstance(x, Where):
        return where(x.condition, _zero(x.yes), _zero(x.no))
    return Const(_value(x) == 0)


def _value(leaf: Expression) -> float | None:
    if isinstance(leaf, Const):
        return None if isinstance(leaf.value, bool) else leaf.value
    return float(leaf.constant) if isinstance(leaf, Affine) and not leaf.terms else None


def _dropping(value: object) -> float | None:
    """A number that drops a key when it is a logit, or None. A node must be a constant."""
    if isinstance(value, fx.Node) and name_of(value) in ("full", "scalar_tensor"):
        value = value.args[-1]
    if isinstance(value, float) and value <= DROPPING:
        return value
    return None


def _test(padding: Padding) -> Test:
    """Where a padding input holds the batch and the keys. Raises Unknown when it is not one row per
    sequence.
    """
    places: dict[str, int] = {}
    for axis, form in enumerate(padding.datum.index):
        if form == Affine():
            continue
        if form not in (variable("b"), variable("j")):
            raise Unknown(f"the input `{padding.datum.name}` is not read at the key's position")
        places[str(form.terms[0][0])] = axis
    if set(places) != {"b", "j"}:
        raise Unknown(
            f"the input `{padding.datum.name}` does not hold one value per sequence and key"
        )
    return Test(padding.op, padding.value, places["b"], places["j"])


def _extras(attention: fx.Node, spec: AttentionSpec) -> dict[str, fx.Node]:
    """The extras that make the mask; sinks are no part of it."""
    nodes = attention.args[3]
    named: dict[str, fx.Node] = dict(zip(spec.extras, nodes, strict=True))  # type: ignore[arg-type]
    return {name: node for name, node in named.items() if name != "sinks"}


def _shape(attention: fx.Node, operand: int) -> torch.Size:
    node = attention.args[operand]
    assert isinstance(node, fx.Node)
    shape: torch.Size = node.meta["val"].shape
    return shape


def _guilty(reason: str) -> str:
    """The node that an Unknown's message names first."""
    parts = reason.split("`")
    return parts[1] if len(parts) > 2 else ""


__all__ = ["MaskFacts", "Test", "classify"]
