"""Upwards from a softmax to the product of q and k: scale, mask, bias, soft cap, temperature and
sinks are taken along, casts and copies passed by. Where the walk meets something that it does not
know, the answer is a `Stop` that names the node.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from attnopt.compiler.layout import same_size
from attnopt.compiler.program import attribute
from attnopt.compiler.raising import einsum
from attnopt.compiler.raising.crossing import CASTS, CROSSED, SAME, Stop, crossing

if TYPE_CHECKING:
    from attnopt.compiler.raising.anchor import Anchor

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, einsum.EINSUM)
_ADDS = (aten.add.Tensor, aten.add_.Tensor)
_MULS = (aten.mul.Tensor, aten.mul_.Tensor)
_DIVS = (aten.div.Tensor, aten.div_.Tensor)
_WHERES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
_BOUNDS = (
    aten.maximum.default, aten.max.other, aten.clamp_min.default, aten.clamp.default,
)  # fmt: skip
_ABSORBING = -1e30  # a score added to this, in float32 or wider, rounds to this


def up(anchor: Anchor, softmax: fx.Node, module: torch.nn.Module) -> Anchor | Stop:
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
        anchor.passed.append(node)
        node, anchor.sinks = parts
    while True:
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return Stop("the logits do not come from a product of q and k", softmax)
        if node.target in PRODUCTS:
            found = _scores(anchor, node, factor)
            anchor.passed += [] if isinstance(found, Stop) else [node]
            return found
        if node.target in CROSSED:
            stop = crossing(node)
            if stop is not None:
                return stop
            anchor.passed.append(node)
            node = node.args[0]
            continue
        step = _one_step(anchor, node, factor, module)
        if isinstance(step, Stop):
            return step
        anchor.passed.append(node)
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
    if node.target is einsum.EINSUM:
        axes = einsum.scores(node)
        if isinstance(axes, Stop):
            return axes
        anchor.q_axes, anchor.k_axes = axes
        anchor.q, anchor.keys = einsum.operands(node)
        anchor.transposed, anchor.scale = False, factor
        return anchor
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


def is_score(value: Any) -> bool:
    """Whether a value descends, over steps the walk knows, from a product of two activations."""
    for _ in range(24):
        if not isinstance(value, fx.Node) or value.op != "call_function":
            return False
        if value.target in PRODUCTS:
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
