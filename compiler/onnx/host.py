"""Small numbers that an ONNX graph computes with: shapes, axes, scales.

ONNX writes shape arithmetic as operators on integer tensors. Here such tensors stay numbers
(`Host`), so that `torch.export` sees sizes as symbols and the batch and the lengths stay free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import SymBool, SymInt, Tensor

from attnopt.compiler.errors import Problem

MOST = 64  # elements: longer tables of integers are tensors


@dataclass(frozen=True)
class Host:
    """A small tensor as numbers: `array` is a numpy array of objects (ints, floats, bools, and
    sizes that are symbols), `dtype` what ONNX says they are.
    """

    array: Any
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that this stands for."""
        return tuple(self.array.shape)

    @property
    def single(self) -> bool:
        """Whether it holds one number."""
        return bool(self.array.size == 1)

    @property
    def number(self) -> Any:
        """Its one number."""
        return self.array.reshape(-1)[0]

    @property
    def numbers(self) -> list[Any]:
        """Its numbers in order."""
        return list(self.array.reshape(-1))


Value = Tensor | Host | None
"""What flows along an edge; None is an optional input that was left out."""


def host(numbers: Any, dtype: torch.dtype, shape: Sequence[int] | None = None) -> Host:
    """Numbers, nested lists or an array of them as a `Host`."""
    flat: list[Any] = []
    _flatten(numbers, flat)
    array = np.empty(len(flat), dtype=object)
    for i, number in enumerate(flat):
        array[i] = _rounded(number, dtype)
    if shape is None:
        shape = _shape(numbers)
    return Host(array.reshape(tuple(shape)), dtype)


def _flatten(numbers: Any, into: list[Any]) -> None:
    if isinstance(numbers, np.ndarray):
        into.extend(numbers.reshape(-1).tolist() if numbers.dtype != object else list(numbers.flat))
    elif isinstance(numbers, list | tuple):
        for part in numbers:
            _flatten(part, into)
    else:
        into.append(numbers)


def _shape(numbers: Any) -> tuple[int, ...]:
    if isinstance(numbers, np.ndarray):
        return tuple(numbers.shape)
    if isinstance(numbers, list | tuple):
        return (len(numbers), *(_shape(numbers[0]) if numbers else ()))
    return ()


def _rounded(number: Any, dtype: torch.dtype) -> Any:
    """A number as its dtype holds it."""
    if isinstance(number, torch.SymInt | torch.SymFloat | SymBool):
        return number
    if dtype == torch.bool:
        return bool(number)
    if not dtype.is_floating_point:
        whole = int(number)
        if not -(2**63) <= whole < 2**63:
            raise OverflowError(f"{dtype} does not hold a number of {whole.bit_length()} bits")
        return whole
    return torch.tensor(float(number), dtype=dtype).item()


def constant(value: Tensor) -> Value:
    """A constant of the file: numbers where it is small enough to be a shape or a scale."""
    return small(value) if value.numel() == 1 or not value.is_floating_point() else value


def small(value: Tensor) -> Value:
    """A constant as numbers, floats too, where it has at most `MOST` elements."""
    if value.numel() > MOST or value.is_complex():
        return value
    return host(value.tolist(), value.dtype, tuple(value.shape))


def tensor(value: Value) -> Tensor:
    """A value as a tensor."""
    if isinstance(value, Tensor):
        return value
    assert value is not None
    numbers = value.numbers
    if not any(isinstance(n, SymInt | torch.SymFloat | SymBool) for n in numbers):
        return torch.tensor(numbers, dtype=value.dtype).reshape(value.shape)
    parts = [torch.scalar_tensor(n, dtype=value.dtype) for n in numbers]
    return parts[0] if not value.shape else torch.stack(parts).reshape(value.shape)


def sizes(value: Value, what: str) -> list[Any]:
    """The numbers of a value that has to be known without running the model.

    Raises `Problem` A127 for one that depends on the values of tensors.
    """
    if isinstance(value, Host):
        return value.numbers
    raise Problem(
        "A127",
        f"{what} depends on the values of tensors",
        help="only what follows from the shapes of the inputs can be read",
    )


def scalar(value: Value, other: Tensor) -> Any:
    """What stands beside `other` in an elementwise operator: a number where the value is one and
    does not widen the result's rank, else a tensor."""
    if isinstance(value, Host) and value.single and len(value.shape) <= other.dim():
        return value.number
    return tensor(value)


def elementwise(function: Callable[..., Any], dtype: torch.dtype | None, *values: Host) -> Host:
    """A function of numbers on each element, broadcast; `dtype` None is that of the first.

    Raises `Problem` A103 where numbers have no result, as whole numbers over zero.
    """
    try:
        arrays = np.broadcast_arrays(*(value.array for value in values))
        flat = [list(array.reshape(-1)) for array in arrays]
        made = [function(*numbers) for numbers in zip(*flat, strict=True)]
        return host(made, dtype or values[0].dtype, arrays[0].shape)
    except (ArithmeticError, ValueError) as error:
        raise Problem(
            "A103",
            "the graph computes with constants that have no result",
            why=str(error),
            help="export the model again",
        ) from error


def truncated(a: Any, b: Any) -> Any:
    """The quotient of two numbers; of whole numbers, as ONNX has it, cut towards zero."""
    if isinstance(a, int | SymInt) and isinstance(b, int | SymInt):
        plain = isinstance(a, int) and isinstance(b, int)
        return -(-a // b) if plain and (a < 0) != (b < 0) else a // b
    if isinstance(a, float) and isinstance(b, float):
        with np.errstate(all="ignore"):  # over zero, floats give infinity or NaN
            return float(np.float64(a) / np.float64(b))
    return a / b


def powered(a: Any, b: Any) -> Any:
    """A power; floats without a real one give NaN, whole numbers are cut towards zero."""
    if isinstance(a, int) and isinstance(b, int):
        if abs(a) > 1 and b >= 64:
            raise OverflowError(f"{a} to the power {b} is no whole number of 64 bits")
        return int(a**b)
    if isinstance(a, int | float) and isinstance(b, int | float):
        with np.errstate(all="ignore"):
            return float(np.power(np.float64(a), np.float64(b)))
    return a**b


def whole(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A rounding of a number, which leaves infinity and NaN as they are."""
    return lambda x: x if isinstance(x, float) and not math.isfinite(x) else function(x)
