"""Which nodes of a graph compute every token on its own, and what they compute on packed tokens.

`analyse` walks the graph once. A node is token-wise when its value at (batch b, position s) depends
on its inputs only there; that is proved from the operator's meaning and from the layout of its
inputs, never from a name. Each such node gets a `Form`: the call that computes its packed value
`[N, free...]` from the packed values of its inputs. Attention with padding is the one node that may
mix positions: it stays within a sequence.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from attnopt.compiler.layout import Extent, Layout, is_symbol
from attnopt.compiler.packed_form import Form, Tokenwise, arguments
from attnopt.compiler.token_rules import embedding, rule_of


def analyse(
    graph: fx.Graph, extent: Extent, padding: fx.Node, equal: Callable[[Any, Any], bool]
) -> Tokenwise:
    """Find the token-wise nodes.

    `padding` is the attentions' bool `[B, S]`; `equal` says whether two nodes compute the same.
    """
    found = Tokenwise(extent, padding, equal)
    for node in graph.nodes:
        form = _form(node, found)
        if isinstance(form, Form):
            found.forms[node] = form
            if isinstance(form.layout, Layout):
                found.layouts[node] = form.layout
            continue
        if form:
            found.reasons[node] = form
        seed = _seed(node, extent)
        if seed is not None:
            found.layouts[node] = seed
    return found


def _seed(node: fx.Node, extent: Extent) -> Layout | None:
    """The layout of a float value `[B, S, ...]` or `[S, B, ...]`, taken from its shape: packed
    where a token-wise node reads it."""
    value = node.meta.get("val")
    if node.op not in ("placeholder", "call_function") or not isinstance(value, Tensor):
        return None
    if value.dim() < 3 or not value.is_floating_point():
        return None
    if any(is_symbol(size) for size in value.shape[2:]):
        return None
    rest = tuple((int(size),) for size in value.shape[2:])
    for layout in (Layout((("B",), ("S",), *rest)), Layout((("S",), ("B",), *rest))):
        if extent.fits(layout, value.shape):
            return layout
    return None


def _form(node: fx.Node, t: Tokenwise) -> Form | str:
    """The packed form of a node; a reason when it reads padded values in another way; "" when it
    reads none."""
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return _getitem(node, t)
    rule = rule_of(node)
    if not t.inputs(node) and rule is not embedding:
        return ""
    if rule is None:
        return f"`{node.target}` is not known to work token by token"
    if node.target._schema.is_mutable:  # type: ignore[union-attr]
        return f"`{node.target}` writes into its input"
    form = rule(node, arguments(node), t)
    if isinstance(form, Form) and not _fits(node, form, t):
        return f"the shape of `{node.name}` does not follow from its inputs"
    return form


def _fits(node: fx.Node, form: Form, t: Tokenwise) -> bool:
    value = node.meta.get("val")
    if isinstance(form.layout, Layout):
        return isinstance(value, Tensor) and t.extent.fits(form.layout, value.shape)
    return all(t.extent.fits(lay, v.shape) for lay, v in zip(form.layout, value, strict=True))  # type: ignore[arg-type]


def _getitem(node: fx.Node, t: Tokenwise) -> Form | str:
    source = t.forms.get(node.args[0])  # type: ignore[arg-type]
    if source is None or isinstance(source.layout, Layout):
        return ""
    return Form(source.layout[node.args[1]], operator.getitem, node.args)  # type: ignore[index]
