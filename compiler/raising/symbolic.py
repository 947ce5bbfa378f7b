"""What one element of a mask tensor is, as an expression in its indices, read off the graph.

`Symbolic.at(node, index)` goes from the mask down to its sources: a view, slice or transpose
changes the index expressions, arithmetic and comparisons combine the operands' elements, `arange`
turns an index into a number, a constant buffer is recognised by its values, and an input tensor
becomes an unknown `Datum` at its index. Nothing is run and no length is assumed. What is not
understood raises `Unknown` with the node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.compiler.program import Program, attribute
from attnopt.compiler.raising import constant, symbolic_views
from attnopt.compiler.raising.evaluate import Unknown
from attnopt.compiler.raising.expression import (
    COMPARISONS,
    Affine,
    Datum,
    Expression,
    add,
    both,
    compare,
    divide,
    is_condition,
    leaves,
    logic,
    map_leaves,
    multiply,
    negate,
    number,
    numeric,
    truth,
    variable,
    where,
)
from attnopt.compiler.raising.mask_relation import chunk
from attnopt.compiler.raising.symbolic_casts import cast_to, holds, runs_over
from attnopt.compiler.raising.symbolic_views import Index, size_form

_LOGIC = {"and": "and", "or": "or", "xor": "xor"}
_SAME = {"contiguous", "clone", "alias", "detach", "lift_fresh_copy", "lift_fresh", "detach_"}
_CASTS = {"to", "to_copy", "type_as", "float", "int", "long"}
_FILLED = {
    "ones": 1, "zeros": 0, "new_ones": 1, "new_zeros": 0, "ones_like": 1, "zeros_like": 0,
}  # fmt: skip


def name_of(node: fx.Node) -> str:
    """The operator's name without namespace and overload: `aten.le.Tensor` is "le"."""
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet, "__name__", str(node.target)).strip("_") if packet else str(node.target)


class Symbolic:
    """Reads elements of one program's tensors as expressions.

    `extents` maps index variable -> size (int or SymInt), for the simplification of merged axes.
    Results are kept.
    """

    def __init__(self, program: Program, extents: Mapping[str, Any]) -> None:
        self.program, self.extents = program, dict(extents)
        self._known: dict[tuple[fx.Node, Index], Expression] = {}
        self._fresh = 0

    def at(self, x: Any, index: Index) -> Expression:
        """The element of `x` (a tensor node, a size node or a number) at `index`. Raises
        Unknown.
        """
        if not isinstance(x, fx.Node):
            return self._number(x)
        value = x.meta.get("val")
        if isinstance(value, (torch.SymInt, int, float, bool)):
            return size_form(value) if isinstance(value, torch.SymInt) else number(value)
        if not isinstance(value, Tensor):
            raise Unknown(f"`{x.name}` is not a tensor")
        key = (x, symbolic_views.broadcast(value.shape, index))
        if key not in self._known:
            self._known[key] = self._named(x, key[1])
            if runs_over(self._known[key], value.dtype):
                raise Unknown(f"`{x.name}` ({x.target}): positions are kept in {value.dtype}")
        return self._known[key]

    def _named(self, node: fx.Node, index: Index) -> Expression:
        try:
            return self._element(node, index)
        except Unknown as error:
            if "`" in str(error):
                raise
            raise Unknown(f"`{node.name}` ({node.target}): {error}") from error

    def _element(self, node: fx.Node, index: Index) -> Expression:
        if node.op == "placeholder":
            self._unchanged(node)
            return _datum(node, index)
        if node.op == "get_attr":
            self._unchanged(node)
            value = attribute(self.program.module, str(node.target))
            return constant.element(value, index)
        if node.op != "call_function":
            raise Unknown(f"a {node.op} is not an index expression")
        self._unchanged(node)
        name = name_of(node)
        operands = [x for x in node.args if isinstance(x, (fx.Node, int, float, bool))]
        if name in COMPARISONS:
            return compare(name, self.at(operands[0], index), self.at(operands[1], index))
        bare = name.removeprefix("bitwise_").removeprefix("logical_")
        if bare in _LOGIC:
            return self._logic(node, bare, index)
        if bare == "not":
            return self._not(node, name, index)
        if name in _SAME:
            return self.at(node.args[0], index)
        if name in _CASTS:
            return self._cast(node, index)
        if name in _FILLED:
            return cast_to(number(_FILLED[name]), node.meta["val"].dtype)
        moved = symbolic_views.moved(node, name, index, self.extents)
        if moved is not None:
            return self.at(node.args[0], moved)
        method = getattr(self, f"_op_{name}", None)
        if method is None:
            raise Unknown("this operator is not an index expression")
        made: Expression = method(node, index)
        return made

    def _unchanged(self, node: fx.Node) -> None:
        """A tensor that is written to in place is only understood through the writing node."""
        for user in _readers(node):
            schema = getattr(user.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                raise Unknown(f"`{node.name}` is written to by `{user.name}`")

    def _through(self, node: fx.Node, index: Index) -> Expression:
        """The first operand of `node`, which `node` may overwrite as its only reader."""
        first = node.args[0]
        schema = getattr(node.target, "_schema", None)
        if not isinstance(first, fx.Node) or schema is None or not schema.is_mutable:
            return self.at(first, index)
        if list(first.users) != [node] or first.op != "call_function":
            raise Unknown(f"`{first.name}` is overwritten while others read it")
        index = symbolic_views.broadcast(first.meta["val"].shape, index)
        if name_of(first) in _FILLED:
            return cast_to(number(_FILLED[name_of(first)]), first.meta["val"].dtype)
        if name_of(first) in ("full", "full_like", "new_full"):
            return self._filled(first, index)
        raise Unknown(f"`{first.name}` is overwritten in place")

    def _number(self, x: Any) -> Expression:
        if isinstance(x, torch.SymInt):
            return size_form(x)
        if isinstance(x, (bool, int, float)):
            return number(x)
        raise Unknown(f"{x!r} is not a number")

    def _logic(self, node: fx.Node, op: str, index: Index) -> Expression:
        if node.meta["val"].dtype != torch.bool:
            raise Unknown("this is bitwise arithmetic on integers")
        return logic(op, self.at(node.args[0], index), self.at(node.args[1], index))

    def _not(self, node: fx.Node, name: str, index: Index) -> Expression:
        if name == "bitwise_not" and node.meta["val"].dtype != torch.bool:
            raise Unknown("this is bitwise arithmetic on integers")
        return negate(self.at(node.args[0], index))

    def _cast(self, node: fx.Node, index: Index) -> Expression:
        x, dtype = self.at(node.args[0], index), node.meta["val"].dtype
        before: torch.dtype = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
        if not holds(dtype, before) and any(_reads(leaf) for leaf in leaves(x)):
            raise Unknown(f"values of an input are rounded or cut from {before} to {dtype}")
        return cast_to(x, dtype)

    def _op_bool(self, node: fx.Node, index: Index) -> Expression:
        return truth(self.at(node.args[0], index))

    def _op_add(self, node: fx.Node, index: Index) -> Expression:
        return self._sum(node, index, 1)

    def _op_sub(self, node: fx.Node, index: Index) -> Expression:
        return self._sum(node, index, -1)

    def _sum(self, node: fx.Node, index: Index, sign: int) -> Expression:
        left, right = self._through(node, index), self.at(node.args[1], index)
        times = node.kwargs.get("alpha", 1)
        if not isinstance(times, (int, float)):
            raise Unknown("its factor is no number")
        if node.meta["val"].dtype == torch.bool:
            return logic("or", left, right)
        return cast_to(add(left, right, sign * times), node.meta["val"].dtype)

    def _op_rsub(self, node: fx.Node, index: Index) -> Expression:
        return add(self.at(node.args[1], index), self.at(node.args[0], index), -1)

    def _op_mul(self, node: fx.Node, index: Index) -> Expression:
        left, right = self._through(node, index), self.at(node.args[1], index)
        if node.meta["val"].dtype == torch.bool:
            return both(left, right)
        return cast_to(multiply(left, right), node.meta["val"].dtype)

    def _op_neg(self, node: fx.Node, index: Index) -> Expression:
        return multiply(number(-1), self.at(node.args[0], index))

    def _op_abs(self, node: fx.Node, index: Index) -> Expression:
        x = numeric(self.at(node.args[0], index))
        return map_leaves(
            lambda a: where(compare("ge", a, number(0)), a, multiply(number(-1), a)), x
        )

    def _op_minimum(self, node: fx.Node, index: Index) -> Expression:
        x, y = (numeric(self.at(node.args[n], index)) for n in (0, 1))
        return map_leaves(lambda a, b: where(compare("le", a, b), a, b), x, y)

    def _op_maximum(self, node: fx.Node, index: Index) -> Expression:
        x, y = (numeric(self.at(node.args[n], index)) for n in (0, 1))
        return map_leaves(lambda a, b: where(compare("ge", a, b), a, b), x, y)

    _op_clamp_min = _op_maximum

    def _op_floor_divide(self, node: fx.Node, index: Index) -> Expression:
        size = node.args[1]
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise Unknown("it divides by no plain number")
        return chunk(self.at(node.args[0], index), size)

    def _op_div(self, node: fx.Node, index: Index) -> Expression:
        if node.kwargs.get("rounding_mode") == "floor":
            return self._op_floor_divide(node, index)
        if node.kwargs.get("rounding_mode") or not isinstance(node.args[1], (int, float)):
            raise Unknown("it divides by no plain number")
        made = divide(self.at(node.args[0], index), float(node.args[1]))
        return cast_to(made, node.meta["val"].dtype)

    def _op_where(self, node: fx.Node, index: Index) -> Expression:
        condition, yes, no = (self.at(node.args[n], index) for n in (0, 1, 2))
        return cast_to(_choose(condition, yes, no), node.meta["val"].dtype)

    def _op_masked_fill(self, node: fx.Node, index: Index) -> Expression:
        filled = self.at(node.args[2], ())
        made = _choose(self.at(node.args[1], index), filled, self._through(node, index))
        return cast_to(made, node.meta["val"].dtype)

    def _filled(self, node: fx.Node, index: Index) -> Expression:
        value = node.args[1] if len(node.args) > 1 else node.kwargs.get("fill_value")
        return cast_to(self.at(value, ()), node.meta["val"].dtype)

    _op_full = _op_full_like = _op_new_full = _filled

    def _op_scalar_tensor(self, node: fx.Node, index: Index) -> Expression:
        return cast_to(self.at(node.args[0], ()), node.meta["val"].dtype)

    def _op_arange(self, node: fx.Node, index: Index) -> Expression:
        first = node.args[0] if len(node.args) > 1 else 0
        step = node.args[2] if len(node.args) > 2 else 1
        return add(self.at(first, ()), multiply(index[0], self.at(step, ())))

    def _op_tril(self, node: fx.Node, index: Index) -> Expression:
        return self._triangle(node, index, "le")

    def _op_triu(self, node: fx.Node, index: Index) -> Expression:
        return self._triangle(node, index, "ge")

    def _triangle(self, node: fx.Node, index: Index, op: str) -> Expression:
        diagonal = self.at(node.args[1] if len(node.args) > 1 else 0, ())
        inside = compare(op, add(index[-1], index[-2], -1), diagonal)
        nothing = cast_to(number(0), node.meta["val"].dtype)
        return _choose(inside, self._through(node, index), nothing)

    def _op_repeat(self, node: fx.Node, index: Index) -> Expression:
        shape, times = node.args[0].meta["val"].shape, list(node.args[1])  # type: ignore[union-attr,arg-type]
        kept = index[len(times) - len(shape) :]
        one = [isinstance(size, int) and size == 1 for size in shape]
        if not all(o or t == 1 for o, t in zip(one, times[len(times) - len(shape) :], strict=True)):
            raise Unknown("it repeats an axis that is longer than 1")
        places = tuple(Affine() if o else at for o, at in zip(one, kept, strict=True))
        return self.at(node.args[0], places)

    def _op_cat(self, node: fx.Node, index: Index) -> Expression:
        parts = list(node.args[0])  # type: ignore[arg-type]
        dim = _dim(node, 1, len(index))
        return self._joined(parts, dim, index)

    def _joined(self, parts: Sequence[Any], dim: int, index: Index) -> Expression:
        if len(parts) == 1:
            return self.at(parts[0], index)
        size = size_form(parts[0].meta["val"].shape[dim])
        rest = self._joined(parts[1:], dim, _replaced(index, dim, index[dim].plus(size, -1)))
        inside = compare("lt", index[dim], size)
        return _choose(inside, self.at(parts[0], index), rest)

    def _op_diff(self, node: fx.Node, index: Index) -> Expression:
        arguments = [*node.args, *(None,) * (5 - len(node.args))]
        order, prepend, append = arguments[1], arguments[3], arguments[4]
        if order not in (None, 1) or append is not None:
            raise Unknown("only first differences without an appended tensor are understood")
        dim = _dim(node, 2, len(index), default=-1)
        parts = [node.args[0]] if prepend is None else [prepend, node.args[0]]
        after = self._joined(parts, dim, _replaced(index, dim, index[dim].plus(Affine((), 1))))
        return add(after, self._joined(parts, dim, index), -1)

    def _op_cumsum(self, node: fx.Node, index: Index) -> Expression:
        from attnopt.compiler.raising.mask_class import constant_value

        dim = _dim(node, 1, len(index))
        self._fresh += 1
        summand = self.at(node.args[0], _replaced(index, dim, variable(f"sum{self._fresh}")))
        try:
            value = constant_value(numeric(summand))
        except Unknown:
            value = None
        if not isinstance(value, int):  # known to be one number per position, and no more
            return variable(Datum(node.name, index, False, _is_real(node), computed=True))
        return index[dim].plus(Affine((), 1)).scaled(value)

    def _op_index(self, node: fx.Node, index: Index) -> Expression:
        given = list(node.args[1])  # type: ignore[arg-type]
        used = [n for n, x in enumerate(given) if x is not None]
        if used != list(range(used[0], used[0] + len(used))):
            raise Unknown("its index tensors are not side by side")
        if any(given[n].meta["val"].dtype in (torch.bool, torch.uint8) for n in used):
            raise Unknown("it is indexed by a mask")
        rank = max(given[n].meta["val"].dim() for n in used)
        before, inner = index[: used[0]], index[used[0] : used[0] + rank]
        picked = [self._position(given[n], inner) for n in used]
        return self.at(node.args[0], (*before, *picked, *index[used[0] + rank :]))

    def _op_index_select(self, node: fx.Node, index: Index) -> Expression:
        dim = _dim(node, 1, len(index))
        return self.at(
            node.args[0], _replaced(index, dim, self._position(node.args[2], (index[dim],)))
        )

    def _position(self, x: Any, index: Index) -> Affine:
        made = numeric(self.at(x, index))
        if not isinstance(made, Affine):
            raise Unknown("its index is not a plain sum")
        if made.constant < 0 or any(c < 0 or isinstance(v, Datum) for v, c in made.terms):
            raise Unknown("its index may be negative or depends on an input")
        return made


def _choose(condition: Expression, yes: Expression, no: Expression) -> Expression:
    if is_condition(yes) != is_condition(no):
        yes, no = numeric(yes), numeric(no)
    return where(condition, yes, no)


def _reads(leaf: Expression) -> bool:
    return isinstance(leaf, Affine) and any(isinstance(name, Datum) for name, _ in leaf.terms)


def _datum(node: fx.Node, index: Index) -> Expression:
    value = node.meta["val"]
    form = variable(Datum(node.name, index, value.dtype == torch.bool, _is_real(node)))
    return truth(form) if value.dtype == torch.bool else form


def _is_real(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype.is_floating_point)


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users of a tensor that write to it, directly or through a view of it."""
    found = []
    for user in node.users:
        if not user.args or user.args[0] is not node:
            continue
        found.append(user)
        if name_of(user) in symbolic_views.VIEWS:
            found += _readers(user)
    return found


def _replaced(index: Index, dim: int, value: Affine) -> Index:
    return (*index[:dim], value, *index[dim + 1 :])


def _dim(node: fx.Node, at: int, rank: int, default: int = 0) -> int:
    value = node.args[at] if len(node.args) > at else node.kwargs.get("dim", default)
    if not isinstance(value, int):
        raise Unknown("its axis is not a number")
    return value % rank
