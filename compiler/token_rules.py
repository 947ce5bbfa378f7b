"""One rule per kind of operator: when it works token by token, and the call that does the same on
packed tokens.

A rule is given a node, its arguments by name and what is known so far; it answers with a `Form`, or
says why the node is not token-wise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.compiler.layout import Dim, Layout, is_free, is_symbol
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.packed_form import Form, Gather, Tokenwise
from attnopt.compiler.packed_ops import PACKED_ATTENTION
from attnopt.compiler.spec import parse_spec

aten = torch.ops.aten
Rule = Callable[[fx.Node, dict[str, Any], Tokenwise], Form | str]


def _call(node: fx.Node) -> Callable[..., Any]:
    """The operator that a node calls."""
    assert callable(node.target)
    return node.target


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a call, or None when its operator is not known to work token by token."""
    found = _RULES.get(node.target)
    if found is None and torch.Tag.pointwise in getattr(_call(node), "tags", ()):
        return pointwise
    return found


def pointwise(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    """Element by element with broadcasting: operands without token axes of their own are cut or
    gathered to fit."""
    shape = node.meta["val"].shape
    main = next(
        (x for n in node.all_input_nodes if (x := t.layout(n)) and len(x.dims) == len(shape)), None
    )
    if main is None:
        return f"`{node.name}` broadcasts its padded operand"
    dims: tuple[Dim, ...] = tuple(
        (int(shape[i]),) if is_free(dim) and not is_symbol(shape[i]) else dim
        for i, dim in enumerate(main.dims)
    )
    made: dict[fx.Node, Any] = {}
    for operand in node.all_input_nodes:
        if isinstance(operand.meta.get("val"), Tensor):
            fitted = _operand(operand, dims, t)
            if isinstance(fitted, str):
                return fitted
            made[operand] = fitted
    args, kwargs = _swap((node.args, dict(node.kwargs)), made)
    return Form(Layout(dims), _call(node), args, kwargs)


def _operand(node: fx.Node, dims: Sequence[Dim], t: Tokenwise) -> Any:
    """An operand of a pointwise call as its packed form reads it; a reason when it cannot be
    fitted."""
    layout = t.layout(node)
    if layout is not None:
        same = len(layout.dims) == len(dims) and all(
            x == y or (is_free(x) and is_free(y)) for x, y in zip(layout.dims, dims, strict=True)
        )
        return node if same else f"`{node.name}` has its tokens on other axes"
    shape = node.meta["val"].shape
    if len(shape) > len(dims):
        return f"`{node.name}` has more axes than the padded operand"
    roles = []
    for size, dim in zip(shape, dims[len(dims) - len(shape) :], strict=True):
        if is_free(dim):
            roles.append("")
        elif not is_symbol(size) and int(size) == 1 and len(dim) == len(_tokens(dim)):
            roles.append("1")
        elif len(dim) == len(_tokens(dim)) and t.extent.fits(Layout((dim,)), (size,)):
            roles.append(_tokens(dim))
        else:
            return f"`{node.name}` does not line up with the padded operand"
    if not any(roles):
        return node
    missing = dims[: len(dims) - len(shape)]
    return Gather(node, (*("" if is_free(dim) else "1" for dim in missing), *roles))


def _tokens(dim: Dim) -> str:
    return "".join(atom for atom in dim if isinstance(atom, str))


def _swap(value: Any, made: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        return made.get(value, value)
    if isinstance(value, dict):
        return {key: _swap(item, made) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            type(value)(_swap(item, made) for item in value)
            if type(value) in (list, tuple)
            else [_swap(i, made) for i in value]
        )
    return value


def _same(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    layout = t.layout(node.args[0])
    if layout is None:
        return f"`{node.name}` takes only its dtype or device from a padded value"
    return Form(layout, _call(node), node.args, dict(node.kwargs))


def _dropout(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    if a["train"] and a["p"]:
        return f"`{node.name}` is an active dropout"
    layout = t.layout(node.args[0])
    return Form(layout, None, (node.args[0],)) if layout else ""


def _product(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    """Linear, matmul, mm, addmm with a weight: the last axis is contracted, the rest stays."""
    first, second = ("mat1", "mat2") if "mat1" in a else ("input" if "input" in a else "self", "")
    second = second or next(name for name in ("weight", "mat2", "other") if name in a)
    layout = t.layout(a[first])
    others = [n for n in node.all_input_nodes if n is not a[first]]
    if layout is None or not is_free(layout.dims[-1]) or any(n in t.layouts for n in others):
        return f"`{node.name}` is not a product of tokens with a weight"
    if len(a[second].meta["val"].shape) != 2 or any(len(n.meta["val"].shape) > 2 for n in others):
        return f"`{node.name}` multiplies by a batch of matrices"
    bias = a.get("self") if first == "mat1" else None
    if isinstance(bias, fx.Node) and len(bias.meta["val"].shape) != 1:
        return f"`{node.name}` adds a matrix"
    return Form(
        layout.put(-1, int(node.meta["val"].shape[-1])), _call(node), node.args, dict(node.kwargs)
    )


def _norm(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    layout = t.layout(a["input"])
    if layout is None or not all(
        is_free(dim) for dim in layout.dims[-len(a["normalized_shape"]) :]
    ):
        return f"`{node.name}` normalises over tokens"
    if any(t.layout(a.get(name)) is not None for name in ("weight", "bias")):
        return f"`{node.name}` scales by a padded value"
    return Form(layout, _call(node), node.args, dict(node.kwargs))


def _view(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    source: Any = node.args[0]
    layout = t.layout(source)
    made = t.extent.view(layout, node.meta["val"].shape) if layout else None
    if layout is None or made is None:
        return f"`{node.name}` mixes tokens with other axes"
    if made.free == layout.free:
        return Form(made, None, (source,))
    return Form(made, aten.reshape.default, (source, [-1, *made.free]))


def _expand(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    source: Any = node.args[0]
    layout, shape = t.layout(source), node.meta["val"].shape
    if layout is None or len(shape) != len(layout.dims):
        return f"`{node.name}` adds axes before the tokens"
    dims = tuple(
        (int(size),) if is_free(dim) else dim for dim, size in zip(layout.dims, shape, strict=True)
    )
    made = Layout(dims)
    if made == layout:
        return Form(made, None, (source,))
    return Form(made, aten.expand.default, (source, [-1, *made.free]))


def _permute(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    source: Any = node.args[0]
    layout = t.layout(source)
    if layout is None:
        return ""
    order = list(range(len(layout.dims)))
    if "dims" in a:
        order = [layout.index(dim) for dim in a["dims"]]
    else:
        i, j = layout.index(a.get("dim0", 0)), layout.index(a.get("dim1", 1))
        order[i], order[j] = order[j], order[i]
    made, packed = layout.permute(order)
    if packed == tuple(range(len(packed))):
        return Form(made, None, (source,))
    return Form(made, aten.permute.default, (source, list(packed)))


def _along(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    """One axis is indexed, cut, normalised or scanned: it must be free.

    A cut that keeps all changes nothing.
    """
    layout = t.layout(a.get("self"))
    value = node.meta["val"]
    if layout is None or any(
        t.layout(x) is not None for x in node.all_input_nodes if x is not a["self"]
    ):
        return f"`{node.name}` reads a padded value as an index"
    if node.target is aten.slice.Tensor and t.extent.fits(layout, value.shape) and a["step"] == 1:
        return Form(layout, None, (a["self"],))
    axis = None if a["dim"] is None else layout.axis(a["dim"])
    if axis is None:
        return f"`{node.name}` works along the sequence"
    made = layout.drop(a["dim"]) if node.target is aten.select.int else None
    if made is None:
        made = layout.put(a["dim"], int(value.shape[layout.index(a["dim"])]))
    return Form(made, _call(node), (), {**a, "dim": axis})


def _reduce(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    layout = t.layout(a.get("self"))
    if layout is None or a.get("dim") is None:
        return f"`{node.name}` reduces over all axes"
    listed = isinstance(a["dim"], (list, tuple))
    dims = sorted({layout.index(d) for d in (a["dim"] if listed else [a["dim"]])}, reverse=True)
    axes = [layout.axis(d) for d in dims]
    if not dims or None in axes:
        return f"`{node.name}` reduces over the sequence"
    made = layout
    for dim in dims:
        made = made.put(dim, 1) if a["keepdim"] else made.drop(dim)
    return Form(made, _call(node), (), {**a, "dim": axes if listed else axes[0]})


def _pieces(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    """Unbind, chunk, split along a free axis."""
    layout = t.layout(a["self"])
    axis = layout.axis(a["dim"]) if layout else None
    if layout is None or axis is None:
        return f"`{node.name}` cuts the sequence"
    if node.target is aten.unbind.int:
        made = tuple(layout.drop(a["dim"]) for _ in node.meta["val"])
    else:
        at = layout.index(a["dim"])
        made = tuple(layout.put(at, int(piece.shape[at])) for piece in node.meta["val"])
    return Form(made, _call(node), (), {**a, "dim": axis})


def _join(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    """Cat and stack of padded values along a free axis."""
    layouts = [t.layout(x) for x in a["tensors"]]
    first = layouts[0]
    if first is None or any(x is None or len(x.dims) != len(first.dims) for x in layouts):
        return f"`{node.name}` joins padded values with others"
    rank, shape = len(first.dims), node.meta["val"].shape
    if node.target is aten.stack.default:
        at = a["dim"] if a["dim"] >= 0 else a["dim"] + rank + 1
        if any(x != first for x in layouts):
            return f"`{node.name}` joins values with their tokens on different axes"
        made = first.insert(at, len(layouts))
    else:
        at = first.index(a["dim"])
        if not is_free(first.dims[at]) or len({x.drop(at) for x in layouts if x is not None}) > 1:
            return f"`{node.name}` joins along the sequence"
        made = first.put(at, int(shape[at]))
    return Form(made, _call(node), (list(a["tensors"]), made.axis(at)))


def embedding(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    ids, weight = a["indices"], a["weight"]
    if weight in t.layouts or not isinstance(ids, fx.Node):
        return ""
    layout = t.layout(ids)
    if layout is None and t.extent.fits(Layout((("B",), ("S",))), ids.meta["val"].shape):
        width = int(node.meta["val"].shape[-1])
        return Form(
            Layout((("B",), ("S",), (width,))), _call(node), (weight, Gather(ids, ("B", "S")))
        )
    if layout is None:
        return ""
    made = layout.insert(len(layout.dims), int(node.meta["val"].shape[-1]))
    return Form(made, _call(node), (weight, ids))


def _attention(node: fx.Node, a: dict[str, Any], t: Tokenwise) -> Form | str:
    spec = parse_spec(a["spec"])
    extras = dict(zip(spec.extras, a["extras"], strict=True))
    padding = extras.pop("padding", None)
    if padding is None:
        return (
            f"attention `{node.name}` has no padding mask (extras: {list(spec.extras) or 'none'})"
        )
    if not t.equal(padding, t.padding):
        return f"attention `{node.name}` has another padding mask than the first one"
    if "sinks" in extras:
        return f"attention `{node.name}` has sink logits, which its packed form has not"
    if any(n in t.layouts for n in extras.values()):
        return f"attention `{node.name}` has a mask or bias computed from the tokens"
    wanted = [
        (spec.heads, spec.head_dim),
        (spec.kv_heads, spec.head_dim),
        (spec.kv_heads, spec.v_dim),
    ]
    for name, (heads, width) in zip("qkv", wanted, strict=True):
        if t.layout(a[name]) != Layout((("B",), (heads,), ("S",), (width,))):
            why = next((t.reasons[n] for n in _above(a[name]) if n in t.reasons), "")
            return f"{name} of attention `{node.name}` is not token-wise" + (
                f": {why}" if why else ""
            )
    packed = spec.with_(extras=tuple(extras))
    layout = Layout((("B",), (spec.heads,), ("S",), (spec.v_dim,)))
    return Form(
        layout, PACKED_ATTENTION, (a["q"], a["k"], a["v"], list(extras.values()), packed.text)
    )


def _above(node: fx.Node, limit: int = 12) -> list[fx.Node]:
    """The nodes that a node is computed from, nearest first, a few steps up."""
    found, front = [node], [node]
    for _ in range(limit):
        front = [n for x in front for n in x.all_input_nodes if n not in found]
        found += dict.fromkeys(front)
    return found


def _rules() -> dict[Any, Rule]:
    named: dict[Rule, str] = {
        _same: "to.dtype to.device to.other to.dtype_layout _to_copy.default type_as.default "
        "contiguous.default hardswish.default log_sigmoid.default",
        pointwise: "__and__.Tensor __or__.Tensor multiply.Tensor multiply.Scalar",
        _dropout: "dropout.default feature_dropout.default",
        _product: "linear.default matmul.default mm.default addmm.default",
        _norm: "layer_norm.default rms_norm.default",
        _view: "view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int "
        "unsqueeze.default squeeze.dim squeeze.dims squeeze.default",
        _expand: "expand.default expand_as.default",
        _permute: "permute.default transpose.int t.default swapaxes.default swapdims.default",
        _along: "select.int slice.Tensor narrow.default index_select.default "
        "repeat_interleave.self_int softmax.int log_softmax.int _softmax.default "
        "_log_softmax.default cumsum.default glu.default",
        _reduce: "mean.dim sum.dim_IntList amax.default amin.default var.correction "
        "std.correction linalg_vector_norm.default norm.ScalarOpt_dim logsumexp.default any.dim "
        "all.dim argmax.default",
        _pieces: "unbind.int chunk.default split.Tensor split.sizes split_with_sizes.default",
        _join: "cat.default stack.default",
        embedding: "embedding.default",
    }
    found: dict[Any, Rule] = {ATTENTION: _attention}
    for rule, names in named.items():
        for name in names.split():
            packet, overload = name.split(".")
            found[getattr(getattr(aten, packet), overload)] = rule
    return found


_RULES = _rules()
