"""Find every softmax attention in a graph, in either spelling, and say which tensors and numbers it
is made of.

SDPA spelling: the operator itself. Eager spelling: anchored at a softmax; downwards over casts and
dropout to the product with v; upwards over scale, mask, bias, soft cap and casts to the product of
q and k. A change of shape on the way must leave the last two axes, queries and keys, alone. Where
the walk meets something that it does not know, the answer is a `Stop` that names the node.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from attnopt.compiler.layout import same_size
from attnopt.compiler.program import attribute
from attnopt.compiler.raising.crossing import CASTS, CROSSED, SAME, Stop, active_dropout, crossing
from attnopt.compiler.spec import CAUSAL, FULL, Fill, Mask

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_MULS = (aten.mul.Tensor, aten.mul_.Tensor)
_DIVS = (aten.div.Tensor, aten.div_.Tensor)
_BOUNDS = (
    aten.maximum.default, aten.max.other, aten.clamp_min.default, aten.clamp.default,
)  # fmt: skip
_ABSORBING = -1e30  # a score added to this, in float32 or wider, rounds to this
_WHERES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)


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
    einsum: tuple[str, str] | None = None

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
    product = _product_below(softmax)
    if isinstance(product, Stop):
        return product
    dim = softmax.args[1]
    if dim not in (-1, softmax.meta["val"].dim() - 1):
        return Stop(f"the softmax runs over dim {dim}, not over the keys", softmax)
    node, cut, values = product
    anchor = Anchor("eager", node, softmax, softmax, values, True)
    if node.target is aten.einsum.default:
        return Stop("attention written with einsum on the value side", node, "use matmul")
    found = _up(anchor, softmax, module)
    if isinstance(found, Anchor) and cut != (found.sinks is not None):
        return Stop("logits are joined to the scores, or weights cut off, but not both", softmax)
    if isinstance(found, Anchor):
        single = softmax.meta["val"].dtype == torch.float32
        found.softmax32 = single and found.q.meta["val"].dtype != torch.float32
    return found


def _product_below(softmax: fx.Node) -> tuple[fx.Node, bool, fx.Node] | Stop:
    """The product with values, whether the weight of the last key is cut off before, and the
    values."""
    node, cut = softmax, False
    while True:
        for user in node.users:
            if user.target in _PRODUCTS and user.target is not aten.baddbmm.default:
                args: Any = user.args
                pair = args[:2] if user.target is not aten.einsum.default else args[1]
                if pair[0] is node and isinstance(pair[1], fx.Node) and pair[1].op != "get_attr":
                    return user, cut, pair[1]
        cuts = [u for u in node.users if _cuts_last(u)]
        if cuts and not cut:
            node, cut = cuts[0], True
            continue
        onwards = [u for u in node.users if u.target in CROSSED]
        if not onwards:
            return _no_product(softmax)
        node = onwards[0]
        stop = crossing(node)
        if stop is not None:
            return replace(stop, attention=_scored(softmax))


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
    """Whether a softmax's input comes, over elementwise steps and joins, from a product of two
    activations."""
    for _ in range(12):
        node = node.args[0] if isinstance(node, fx.Node) and node.args else None
        node = node[0] if isinstance(node, (list, tuple)) and node else node
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return False
        if node.target in _PRODUCTS:
            return all(isinstance(a, fx.Node) and a.op != "get_attr" for a in node.args[:2])
    return False


def _up(anchor: Anchor, softmax: fx.Node, module: torch.nn.Module) -> Anchor | Stop:
    """Walk from the softmax to q k^T, collecting what is done to the logits on the way."""
    node: Any = _unshifted(softmax.args[0])
    factor = 1.0
    if isinstance(node, fx.Node) and node.target is aten.cat.default:
        parts: Any = node.args[0]
        last = node.meta["val"].dim() - 1
        along = node.args[1] if len(node.args) > 1 else 0
        fits = len(parts) == 2 and along in (-1, last)
        if not fits or not is_score(parts[0]) or not same_size(parts[1].meta["val"].shape[-1], 1):
            return Stop("other logits are joined to the scores (attention sinks)", node)
        node, anchor.sinks = parts
    while True:
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return Stop("the logits do not come from a product of q and k", softmax)
        if node.target in _PRODUCTS:
            return _scores(anchor, node, factor)
        if node.target in CROSSED:
            stop = crossing(node)
            if stop is not None:
                return stop
            node = node.args[0]
            continue
        step = _one_step(anchor, node, factor, module)
        if isinstance(step, Stop):
            return step
        node, factor = step


def _unshifted(node: Any) -> Any:
    """Without the row's maximum taken off, which a softmax does not see."""
    if not isinstance(node, fx.Node) or node.target is not aten.sub.Tensor:
        return node
    whole, most = node.args[:2]
    if isinstance(most, fx.Node) and most.target is operator.getitem and most.args[1] == 0:
        most = most.args[0]
    rows = isinstance(most, fx.Node) and most.target in (aten.max.dim, aten.amax.default)
    if not isinstance(most, fx.Node) or not rows or len(most.args) < 2:
        return node
    dims = most.args[1] if isinstance(most.args[1], (list, tuple)) else [most.args[1]]
    last, keeps = node.meta["val"].dim() - 1, len(most.args) > 2 and most.args[2]
    along = len(dims) == 1 and dims[0] in (-1, last)
    return whole if most.args[0] is whole and along and keeps else node


def _one_step(
    anchor: Anchor, node: fx.Node, factor: float, module: torch.nn.Module
) -> tuple[fx.Node, float] | Stop:
    args: Any = node.args
    if node.target in (*_MULS, *_DIVS):
        other = 1 if is_score(args[0]) else 0
        number = _number(args[other], module)
        if other == 0 and node.target in _DIVS:
            return Stop("something is divided by the logits", node)
        if number is None:
            return _tempered(anchor, node, args[1 - other], args[other])
        cap = _soft_cap(node, args[1 - other], number, module)
        if cap is not None:
            if factor != 1.0 or anchor.softcap or anchor.temperatures:
                return Stop("the logits are scaled outside the soft cap", node)
            anchor.softcap, inner = cap
            return inner, 1.0
        return args[1 - other], factor * (number if node.target in _MULS else 1.0 / number)
    if anchor.softcap or anchor.temperatures:
        what = "the soft cap" if anchor.softcap else "a scale by a tensor"
        return Stop(f"a bias or mask inside {what} is not understood", node)
    if anchor.lowered and node.target in (*_ADDS, aten.sub.Tensor):
        return Stop(f"a bias is added to logits before {anchor.lowest:g} replaces some", node)
    if node.target in _ADDS:
        side = _added_side(args)
        if side is None:
            return Stop("two score matrices are added", node)
        factors = (factor, factor * _alpha(node))
        if isinstance(args[side], fx.Node):
            anchor.added.append((args[side], factors[side]))
        return args[1 - side], factors[1 - side]
    if node.target is aten.sub.Tensor and is_score(args[0]):
        if isinstance(args[1], fx.Node):
            anchor.added.append((args[1], -factor * _alpha(node)))
        return args[0], factor
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar):
        if factor != 1.0:
            return Stop("the masked logits are scaled again", node)
        return _masked(anchor, node, args[0], args[1], args[2], anchor.dropped, module)
    if node.target in _WHERES:
        if factor != 1.0:
            return Stop("the masked logits are scaled again", node)
        if is_score(args[1]):
            return _masked(anchor, node, args[1], args[0], args[2], anchor.keep, module)
        return _masked(anchor, node, args[2], args[0], args[1], anchor.dropped, module)
    if node.target in _BOUNDS:
        bound = _number(args[1], module)
        if bound is not None and bound <= -1e30 and (len(args) < 3 or args[2] is None):
            if anchor.added or anchor.filled is not None or factor != 1.0:
                return Stop("the logits are masked or scaled after they are bounded below", node)
            anchor.floor = bound
            return args[0], factor
    return Stop(f"`{node.target}` between the scores and the softmax is not understood", node)


def _tempered(
    anchor: Anchor, node: fx.Node, score: Any, tensor: Any
) -> tuple[fx.Node, float] | Stop:
    """A scale of its own per head or query, which the queries can carry."""
    value = tensor.meta.get("val") if isinstance(tensor, fx.Node) else None
    if not isinstance(value, Tensor) or not is_score(score):
        return Stop("the logits are scaled by a tensor", node)
    if value.dim() and not same_size(value.shape[-1], 1):
        return Stop("the logits are scaled by a tensor that differs between keys", node)
    if torch.promote_types(value.dtype, score.meta["val"].dtype) != score.meta["val"].dtype:
        return Stop(f"the logits are scaled by a tensor of {value.dtype}", node)
    anchor.temperatures.append((tensor, node.target in _DIVS))
    return score, 1.0


def _masked(
    anchor: Anchor,
    node: fx.Node,
    score: Any,
    condition: Any,
    value: Any,
    into: list[fx.Node],
    module: Any,
) -> tuple[fx.Node, float] | Stop:
    number = _number(value, module)
    if number is None or number > -1e4:
        return Stop(
            "the logits are replaced by something that is not a large negative number", node
        )
    if anchor.lowered and number != anchor.lowest:
        return Stop(f"some logits are replaced by {number:g}, others by {anchor.lowest:g}", node)
    if anchor.added and number != -math.inf:
        # The lowest number and what is added are joined into one term in their own dtype.
        dtypes = {added.meta["val"].dtype for added, _ in anchor.added}
        narrow = dtypes != {node.meta["val"].dtype}
        if number > _ABSORBING or anchor.floor is not None or narrow:
            return Stop(f"a bias or mask is added to logits already replaced by {number:g}", node)
        anchor.lowered.append((condition, into is anchor.dropped))
        anchor.lowest = number
        return score, 1.0
    if anchor.floor is not None:
        number = max(number, anchor.floor)
    if anchor.filled not in (None, number):
        return Stop(f"some logits are replaced by {number:g}, others by {anchor.filled:g}", node)
    anchor.filled = number
    into.append(condition)
    return score, 1.0


def _alpha(node: fx.Node) -> float:
    """What `add` and `sub` multiply their second operand by."""
    return float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]


def _soft_cap(node: fx.Node, tanh: Any, cap: float, module: Any) -> tuple[float, fx.Node] | None:
    if (
        node.target not in _MULS
        or not isinstance(tanh, fx.Node)
        or tanh.target is not aten.tanh.default
    ):
        return None
    inner: Any = tanh.args[0]
    if inner.target in _DIVS and _number(inner.args[1], module) == cap:
        return cap, inner.args[0]
    if inner.target in _MULS:
        number = _number(inner.args[1], module)
        if number is not None and abs(number * cap - 1.0) < 1e-9:
            return cap, inner.args[0]
    return None


def _scores(anchor: Anchor, node: fx.Node, factor: float) -> Anchor | Stop:
    args: Any = node.args
    if node.target is aten.einsum.default:
        return _einsum_scores(anchor, node, factor)
    if node.target is aten.baddbmm.default:
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if beta != 0:
            if anchor.lowered:
                return Stop("a bias is added to logits before others replace them", node)
            anchor.added.append((args[0], factor * float(beta)))  # type: ignore[arg-type]
        factor *= float(alpha)  # type: ignore[arg-type]
        args = args[1:]
    if any(a.op == "get_attr" for a in args[:2]):
        return Stop(
            "the scores are a product with a parameter, not of q and k", node, attention=False
        )
    anchor.q, anchor.keys, anchor.scale = args[0], args[1], factor
    return anchor


def _einsum_scores(anchor: Anchor, node: fx.Node, factor: float) -> Anchor | Stop:
    equation = str(node.args[0]).replace(" ", "")
    operands: Any = node.args[1]
    inputs, _, out = equation.partition("->")
    left, _, right = inputs.partition(",")
    batch, s, t = out[:-2], out[-2:-1], out[-1:]
    if len(operands) != 2 or len(left) != len(out) or len(right) != len(out):
        return Stop(f"einsum `{equation}` is not a product of q and k per head", node)
    depth = (set(left) & set(right)) - set(out)
    if len(depth) != 1 or s not in left or t not in right:
        return Stop(f"einsum `{equation}` is not a product of q and k per head", node)
    d = depth.pop()
    anchor.q, anchor.keys, anchor.transposed, anchor.scale = operands[0], operands[1], False, factor
    anchor.einsum = (f"{left}->{batch}{s}{d}", f"{right}->{batch}{t}{d}")
    return anchor


def is_score(value: Any) -> bool:
    """Whether a value descends, over steps the walk knows, from a product of two activations."""
    for _ in range(24):
        if not isinstance(value, fx.Node) or value.op != "call_function":
            return False
        if value.target in _PRODUCTS:
            return True
        if value.target in _WHERES:
            args: Any = value.args
            value = args[1] if is_score(args[1]) else args[2]
            continue
        known = (
            *CROSSED, *_MULS, *_DIVS, *_ADDS, aten.sub.Tensor,
            aten.tanh.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
            aten.masked_fill_.Scalar, *_BOUNDS,
        )  # fmt: skip
        if value.target not in known:
            return False
        pair: Any = value.args
        value = pair[0] if len(pair) < 2 or not is_score(pair[1]) else pair[1]
    return False


def _added_side(args: Any) -> int | None:
    """Which operand of an add is the bias: the one that is not a score, or None when both are."""
    scores = [is_score(a) for a in args[:2]]
    if all(scores):
        return None
    return 1 if scores[0] else 0


def _number(value: Any, module: torch.nn.Module) -> float | None:
    """A Python number, or the value of a constant one-element tensor, or None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        tensor = attribute(module, str(value.target))
        if isinstance(tensor, Tensor) and tensor.numel() == 1 and tensor.device.type != "meta":
            return None if isinstance(tensor, torch.nn.Parameter) else float(tensor)
        return None
    if value.target in (aten.full.default, aten.scalar_tensor.default):
        inner: Any = value.args[1] if value.target is aten.full.default else value.args[0]
        shape: Any = value.args[0] if value.target is aten.full.default else ()
        return float(inner) if not shape and isinstance(inner, (int, float)) else None
    if value.target in (*CASTS, *SAME):
        return _number(value.args[0], module)
    return None
