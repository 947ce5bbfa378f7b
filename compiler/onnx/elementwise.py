"""Operators that work element by element."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.compiler.onnx.dtypes import torch_dtype
from attnopt.compiler.onnx.graph import Node
from attnopt.compiler.onnx.host import (
    Host,
    Value,
    elementwise,
    host,
    powered,
    scalar,
    tensor,
    truncated,
    whole,
)
from attnopt.compiler.onnx.table import operator

_UNARY: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any] | None]] = {
    "Neg": (torch.neg, python.neg),
    "Abs": (torch.abs, abs),
    "Sqrt": (torch.sqrt, lambda x: powered(x, 0.5)),
    "Reciprocal": (torch.reciprocal, lambda x: truncated(1.0, x)),
    "Floor": (torch.floor, whole(math.floor)),
    "Ceil": (torch.ceil, whole(math.ceil)),
    "Not": (torch.logical_not, lambda x: not x),
    "Exp": (torch.exp, None),
    "Log": (torch.log, None),
    "Erf": (torch.erf, None),
    "Sin": (torch.sin, None),
    "Cos": (torch.cos, None),
    "Tan": (torch.tan, None),
    "Tanh": (torch.tanh, None),
    "Sigmoid": (torch.sigmoid, None),
    "Relu": (torch.relu, None),
    "Softplus": (F.softplus, None),
    "Softsign": (F.softsign, None),
    "HardSwish": (F.hardswish, None),
    "Mish": (F.mish, None),
    "Sign": (torch.sign, None),
    "Round": (torch.round, whole(round)),
    "IsNaN": (torch.isnan, None),
    "BitwiseNot": (torch.bitwise_not, None),
}
_BINARY: dict[str, tuple[Callable[..., Tensor], Callable[[Any, Any], Any]]] = {
    "Add": (torch.add, python.add),
    "Sub": (torch.sub, python.sub),
    "Mul": (torch.mul, python.mul),
    "BitwiseAnd": (torch.bitwise_and, python.and_),
    "BitwiseOr": (torch.bitwise_or, python.or_),
}
_TESTS: dict[str, tuple[Callable[..., Tensor], Callable[[Any, Any], Any]]] = {
    "Equal": (torch.eq, python.eq),
    "Less": (torch.lt, python.lt),
    "LessOrEqual": (torch.le, python.le),
    "Greater": (torch.gt, python.gt),
    "GreaterOrEqual": (torch.ge, python.ge),
}
_LOGIC: dict[str, tuple[Callable[..., Tensor], Callable[[Any, Any], Any]]] = {
    "And": (torch.logical_and, lambda a, b: a and b),
    "Or": (torch.logical_or, lambda a, b: a or b),
    "Xor": (torch.logical_xor, lambda a, b: bool(a) != bool(b)),
}


@operator(*_UNARY)
def unary(node: Node, x: Value) -> Value:
    """An operator of one tensor."""
    function, number = _UNARY[node.operator]
    if isinstance(x, Host) and number is not None:
        return elementwise(number, None, x)
    return function(tensor(x))


@operator(*_BINARY)
def binary(node: Node, a: Value, b: Value) -> Value:
    """An operator of two tensors of one dtype."""
    return _of_two(*_BINARY[node.operator], None, a, b)


@operator(*_TESTS)
def compare(node: Node, a: Value, b: Value) -> Value:
    """A comparison."""
    return _of_two(*_TESTS[node.operator], torch.bool, a, b)


@operator(*_LOGIC)
def logic(node: Node, a: Value, b: Value) -> Value:
    """A logical operator; torch's takes tensors only."""
    function, number = _LOGIC[node.operator]
    if isinstance(a, Host) and isinstance(b, Host):
        return elementwise(number, torch.bool, a, b)
    return function(tensor(a), tensor(b))


def _of_two(
    function: Callable[..., Tensor],
    number: Callable[[Any, Any], Any],
    dtype: torch.dtype | None,
    a: Value,
    b: Value,
) -> Value:
    if isinstance(a, Host) and isinstance(b, Host):
        return elementwise(number, dtype, a, b)
    if isinstance(a, Tensor):
        return function(a, scalar(b, a))
    assert isinstance(b, Tensor)
    if function in (torch.add, torch.mul, torch.eq, torch.bitwise_and, torch.bitwise_or):
        return function(b, scalar(a, b))
    mirrored = {torch.lt: torch.gt, torch.le: torch.ge, torch.gt: torch.lt, torch.ge: torch.le}
    if function in mirrored:
        return mirrored[function](b, scalar(a, b))
    left = scalar(a, b)
    return torch.rsub(b, left) if not isinstance(left, Tensor) else function(left, b)


@operator("Div")
def div(node: Node, a: Value, b: Value) -> Value:
    """A quotient; that of whole numbers is cut towards zero."""
    if isinstance(a, Host) and isinstance(b, Host):
        return elementwise(truncated, None, a, b)
    left = a if isinstance(a, Tensor) else tensor(a)
    if left.is_floating_point():
        return torch.div(left, scalar(b, left))
    return torch.div(left, scalar(b, left), rounding_mode="trunc")


@operator("Mod", reads="fmod")
def mod(node: Node, a: Value, b: Value) -> Value:
    """A remainder: with the divisor's sign, or the dividend's where `fmod` is set."""
    if isinstance(a, Host) and isinstance(b, Host) and not node.get("fmod", 0):
        return elementwise(python.mod, None, a, b)
    left = tensor(a)
    return (torch.fmod if node.get("fmod", 0) else torch.remainder)(left, scalar(b, left))


@operator("Pow")
def power(node: Node, a: Value, b: Value) -> Value:
    """A power, in the dtype of the base."""
    if isinstance(a, Host) and isinstance(b, Host):
        return elementwise(powered, None, a, b)
    left = tensor(a)
    made = torch.pow(left, scalar(b, left))
    return made if made.dtype == left.dtype else made.to(left.dtype)


@operator("Min", "Max")
def extreme(node: Node, *values: Value) -> Value:
    """The least or the greatest of several."""
    low = node.operator == "Min"
    if all(isinstance(value, Host) for value in values):
        pick = torch.sym_min if low else torch.sym_max
        return reduce(lambda a, b: elementwise(pick, None, a, b), values)  # type: ignore[arg-type]
    first = next(value for value in values if isinstance(value, Tensor))
    made = first
    for value in values:
        if value is first:
            continue
        other = scalar(value, made)
        if isinstance(other, Tensor):
            made = (torch.minimum if low else torch.maximum)(made, other)
        else:
            made = torch.clamp_max(made, other) if low else torch.clamp_min(made, other)
    return made


@operator("Sum", "Mean")
def several(node: Node, *values: Value) -> Tensor:
    """The sum or the mean of several."""
    total = reduce(torch.add, [tensor(value) for value in values])
    return total / len(values) if node.operator == "Mean" else total


@operator("Clip")
def clip(node: Node, x: Value, low: Value = None, high: Value = None) -> Tensor:
    """Values kept between two bounds."""
    made = tensor(x)
    if low is not None:
        bound = scalar(low, made)
        wide = isinstance(bound, Tensor)
        made = torch.maximum(made, bound) if wide else torch.clamp_min(made, bound)
    if high is not None:
        bound = scalar(high, made)
        wide = isinstance(bound, Tensor)
        made = torch.minimum(made, bound) if wide else torch.clamp_max(made, bound)
    return made


@operator("Where")
def where(node: Node, condition: Value, a: Value, b: Value) -> Value:
    """One of two by a condition."""
    if isinstance(condition, Host):
        if isinstance(a, Host) and isinstance(b, Host):
            return elementwise(lambda c, x, y: x if c else y, a.dtype, condition, a, b)
        condition = tensor(condition)
    assert isinstance(condition, Tensor) and a is not None and b is not None
    if isinstance(a, Host) and isinstance(b, Host):
        a = tensor(a)
    left = a if isinstance(a, Tensor) else scalar(a, condition)
    right = b if isinstance(b, Tensor) else scalar(b, condition)
    return torch.where(condition, left, right)


@operator("Cast", reads="to saturate round_mode")
def cast(node: Node, x: Value) -> Value:
    """Another dtype."""
    return _cast(x, torch_dtype(int(node.get("to")), node.name))


@operator("CastLike", reads="saturate round_mode")
def cast_like(node: Node, x: Value, like: Value) -> Value:
    """The dtype of another tensor."""
    assert like is not None
    return _cast(x, like.dtype)


def _cast(x: Value, dtype: torch.dtype) -> Value:
    if isinstance(x, Tensor):
        return x if x.dtype == dtype else x.to(dtype)
    assert x is not None
    if dtype.is_floating_point and not x.dtype.is_floating_point:
        return elementwise(_float, dtype, x)
    if not dtype.is_floating_point and x.dtype.is_floating_point:
        return elementwise(torch.sym_int, dtype, x)
    return host(x.numbers, dtype, x.shape)


def _float(number: Any) -> Any:
    return torch.sym_float(int(number) if isinstance(number, bool) else number)


@operator("Identity")
def identity(node: Node, x: Value) -> Value:
    """The value itself."""
    return x


@operator("Dropout", reads="seed")
def dropout(node: Node, x: Value, ratio: Value = None, training: Value = None) -> Any:
    """The value itself: models are read for inference."""
    made = tensor(x)
    return (made, torch.ones_like(made, dtype=torch.bool)) if node.has(1) else made


@operator("Gelu", reads="approximate")
def gelu(node: Node, x: Value) -> Tensor:
    """GELU, exact or by tanh."""
    return F.gelu(tensor(x), approximate=_text(node.get("approximate", "none")))


@operator("LeakyRelu", reads="alpha")
def leaky_relu(node: Node, x: Value) -> Tensor:
    """A line of another slope below zero."""
    return F.leaky_relu(tensor(x), node.get("alpha", 0.01))


@operator("Elu", reads="alpha")
def elu(node: Node, x: Value) -> Tensor:
    """An exponential below zero."""
    return F.elu(tensor(x), node.get("alpha", 1.0))


@operator("HardSigmoid", reads="alpha beta")
def hard_sigmoid(node: Node, x: Value) -> Tensor:
    """A line cut at 0 and 1."""
    return torch.clamp(tensor(x) * node.get("alpha", 0.2) + node.get("beta", 0.5), 0, 1)


@operator("Swish", reads="alpha")
def swish(node: Node, x: Value) -> Tensor:
    """x sigmoid(alpha x)."""
    made, alpha = tensor(x), node.get("alpha", 1.0)
    return F.silu(made) if alpha == 1.0 else made * torch.sigmoid(made * alpha)


@operator("IsInf", reads="detect_negative detect_positive")
def is_inf(node: Node, x: Value) -> Tensor:
    """Whether an element is infinite, of the signs asked for."""
    made = tensor(x)
    up, down = torch.isposinf(made), torch.isneginf(made)
    wanted = [one for one, flag in ((up, "detect_positive"), (down, "detect_negative"))
              if node.get(flag, 1)]  # fmt: skip
    return reduce(torch.logical_or, wanted) if wanted else torch.zeros_like(up)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
