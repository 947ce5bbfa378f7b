"""Find every softmax attention in a graph, in either spelling, and say which tensors and numbers it
is made of.

SDPA spelling: the operator itself. Eager spelling: anchored at a softmax; downwards over casts and
dropout to the product with v; upwards over scale, mask, bias, soft cap and casts to the product of
q and k. A change of shape on the way must leave the last two axes, queries and keys, alone. Where
the walk meets something that it does not know, the answer is a `Stop` that names the node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from attnopt.compiler.raising import einsum
from attnopt.compiler.raising.crossing import CROSSED, Stop, active_dropout, crossing
from attnopt.compiler.raising.einsum import Axes
from attnopt.compiler.raising.logits import PRODUCTS, up
from attnopt.compiler.spec import CAUSAL, FULL, Fill, Mask

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


@dataclass
class Anchor:
    """One attention as found: `out` is the node whose value is softmax(...) v.

    `q` `[.., S, d]`, `keys` (`k` when `transposed` is False, else k already transposed), `v`;
    `added` are float tensors added to the scaled logits (with a factor), `dropped` bool tensors
    with True = not read, `keep` with True = read. `filled` is the number that the logits of keys
    not read are replaced by, `floor` the number that no logit is below after the masks. `lowered`
    are the conditions (and what they are where a key is not read) under which a logit is replaced
    by `lowest` before something is added to it: a number that absorbs any score. `temperatures` are
    tensors `[.., heads, S, 1]` (broadcast) that the scores are multiplied by, or divided by (True).
    `sinks` `[.., heads, S, 1]` is one more logit of each row, whose weight is cut off again.
    `q_axes` to `out_axes` say how the axes of an einsum's operands and result lie.
    `passed` are the nodes that the walk understood, in its order.
    """

    spelling: Literal["sdpa", "eager"]
    out: fx.Node
    q: fx.Node
    keys: fx.Node
    v: fx.Node
    transposed: bool
    scale: float = 1.0
    mask: Mask = FULL
    softcap: float = 0.0
    filled: float | None = None
    floor: float | None = None
    softmax32: bool = False
    added: list[tuple[fx.Node, float]] = field(default_factory=list)
    dropped: list[fx.Node] = field(default_factory=list)
    keep: list[fx.Node] = field(default_factory=list)
    lowered: list[tuple[fx.Node, bool]] = field(default_factory=list)
    lowest: float | None = None
    temperatures: list[tuple[fx.Node, bool]] = field(default_factory=list)
    sinks: fx.Node | None = None
    q_axes: Axes | None = None
    k_axes: Axes | None = None
    v_axes: Axes | None = None
    out_axes: Axes | None = None
    passed: list[fx.Node] = field(default_factory=list)

    @property
    def fill(self) -> Fill:
        """What a key that is not read gets, as the spec names it."""
        return "-inf" if self.filled in (None, -math.inf) else "min"


def anchors(graph: fx.Graph, module: torch.nn.Module) -> list[Anchor | Stop]:
    """Every attention of the graph in order, and a Stop for each softmax that looks like one and
    was not understood."""
    found: list[Anchor | Stop] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is SDPA:
            found.append(_fused(node))
        elif node.target in SOFTMAX:
            answer = _eager(node, module)
            if isinstance(answer, Anchor) or answer.attention:
                found.append(answer)
    return found


def _fused(node: fx.Node) -> Anchor | Stop:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    values: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if values.get("dropout_p"):
        return active_dropout(node)
    q, k, v = values["query"], values["key"], values["value"]
    scale = values.get("scale")
    if scale is None:
        scale = 1.0 / math.sqrt(int(q.meta["val"].shape[-1]))
    anchor = Anchor("sdpa", node, q, k, v, False, float(scale))
    if values.get("is_causal"):
        anchor.mask = CAUSAL
    mask = values.get("attn_mask")
    if isinstance(mask, fx.Node):
        is_bool = mask.meta["val"].dtype == torch.bool
        anchor.keep += [mask] if is_bool else []
        anchor.added += [] if is_bool else [(mask, 1.0)]
    return anchor


def _eager(softmax: fx.Node, module: torch.nn.Module) -> Anchor | Stop:
    passed = [softmax]
    answer = _around(softmax, module, passed)
    return answer if isinstance(answer, Anchor) else replace(answer, passed=tuple(passed))


def _around(softmax: fx.Node, module: torch.nn.Module, passed: list[fx.Node]) -> Anchor | Stop:
    """The attention around a softmax; what is understood on the way is appended to `passed`."""
    product = _product_below(softmax, passed)
    if isinstance(product, Stop):
        return product
    dim = softmax.args[1]
    if dim not in (-1, softmax.meta["val"].dim() - 1):
        return Stop(f"the softmax runs over dim {dim}, not over the keys", softmax)
    node, cut, weights = product
    anchor = Anchor("eager", node, softmax, softmax, einsum.operands(node)[1], True, passed=passed)
    if node.target is einsum.EINSUM:
        taken = einsum.values(node, weights)
        if isinstance(taken, Stop):
            return taken
        anchor.v, anchor.v_axes, anchor.out_axes = taken
    passed.append(node)
    found = up(anchor, softmax, module)
    if isinstance(found, Anchor) and cut != (found.sinks is not None):
        return Stop("logits are joined to the scores, or weights cut off, but not both", softmax)
    if isinstance(found, Anchor):
        single = softmax.meta["val"].dtype == torch.float32
        found.softmax32 = single and found.q.meta["val"].dtype != torch.float32
    return found


def _product_below(softmax: fx.Node, passed: list[fx.Node]) -> tuple[fx.Node, bool, fx.Node] | Stop:
    """The product with values, whether the weight of the last key is cut off before, and the
    weights that it takes."""
    node, cut = softmax, False
    while True:
        for user in node.users:
            if user.target in PRODUCTS and user.target is not aten.baddbmm.default:
                pair = einsum.operands(user)
                if len(pair) != 2 or any(getattr(x, "op", "get_attr") == "get_attr" for x in pair):
                    continue
                if pair[0] is node or user.target is einsum.EINSUM:
                    return user, cut, node
        mixed = [u for u in node.users if u.target is einsum.EINSUM and einsum.mixes(u) is node]
        if mixed:
            reason = "a parameter mixes the heads' weights before the values (talking heads)"
            return Stop(reason, mixed[0], attention=_scored(softmax))
        cuts = [u for u in node.users if _cuts_last(u)]
        if cuts and not cut:
            node, cut = cuts[0], True
            passed.append(node)
            continue
        onwards = [u for u in node.users if u.target in CROSSED]
        if not onwards:
            return _no_product(softmax)
        node = onwards[0]
        stop = crossing(node)
        if stop is not None:
            return replace(stop, attention=_scored(softmax))
        passed.append(node)


def _cuts_last(node: fx.Node) -> bool:
    """Whether a node is `x[..., :-1]`."""
    if node.target is not aten.slice.Tensor:
        return False
    given: list[Any] = [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]
    dim, start, end, step = given
    last = node.meta["val"].dim() - 1
    return bool(dim in (-1, last) and start in (None, 0) and end == -1 and step in (None, 1))


def _no_product(softmax: fx.Node) -> Stop:
    """What is said of a softmax whose result is multiplied with no values."""
    above: Any = softmax.args[0]
    for _ in range(12):
        if not isinstance(above, fx.Node) or not above.args:
            break
        if above.target is aten.cat.default:
            reason = "other logits are joined to the scores before the softmax (attention sinks)"
            return Stop(reason, above, attention=_scored(softmax))
        above = above.args[0]
    return Stop("its result meets no product with values", softmax, attention=_scored(softmax))


def _scored(node: Any) -> bool:
    """Whether a softmax's input comes, over elementwise steps, joins and mixtures of heads, from a
    product of two activations."""
    for _ in range(12):
        node = node.args[0] if isinstance(node, fx.Node) and node.args else None
        node = node[0] if isinstance(node, (list, tuple)) and node else node
        while isinstance(node, fx.Node) and node.target in PRODUCTS:
            pair = einsum.operands(node)
            if all(isinstance(x, fx.Node) and x.op != "get_attr" for x in pair):
                return True
            node = einsum.mixes(node)
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return False
    return False
