"""Operators that pick elements by index."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.compiler.onnx.graph import Node
from attnopt.compiler.onnx.host import Host, Value, host, sizes, tensor
from attnopt.compiler.onnx.table import operator, refused

_END = 2**31 - 1  # from here on an end of a Slice means the end of the dim


@operator("Gather", reads="axis")
def gather(node: Node, data: Value, index: Value) -> Value:
    """Slices along an axis. A float table of two dims is read as an embedding."""
    assert data is not None and index is not None
    rank = len(data.shape)
    axis = node.get("axis", 0) % rank
    if isinstance(data, Host) and isinstance(index, Host):
        wanted = np.array([int(n) for n in index.numbers], np.int64).reshape(index.shape)
        return host(np.take(data.array, wanted, axis), data.dtype)
    if isinstance(index, Host):
        return _picked(tensor(data), axis, index)
    table = tensor(data)
    if axis == 0 and rank == 2 and table.is_floating_point():
        return F.embedding(index, table)
    before: list[Any] = [slice(None)] * axis
    return table[(*before, index)]


def _picked(data: Tensor, axis: int, index: Host) -> Tensor:
    """Known places along an axis."""
    if not index.shape:
        return torch.select(data, axis, index.number)
    numbers = index.numbers
    if len(index.shape) == 1 and numbers and all(isinstance(n, int) and n >= 0 for n in numbers):
        first, steps = numbers[0], {b - a for a, b in pairwise(numbers)}
        if steps <= {1}:
            return torch.narrow(data, axis, first, len(numbers))
    before: list[Any] = [slice(None)] * axis
    return data[(*before, tensor(index))]


@operator("Slice")
def slice_(
    node: Node, data: Value, starts: Value, ends: Value, axes: Value = None, steps: Value = None
) -> Value:
    """A range of each of some dims, as Python slices."""
    assert data is not None
    first, last = sizes(starts, "the start of a Slice"), sizes(ends, "the end of a Slice")
    rank = len(data.shape)
    dims = range(len(first)) if axes is None else [int(a) % rank for a in sizes(axes, "axes")]
    by = [1] * len(first) if steps is None else sizes(steps, "the step of a Slice")
    made: Any = data.array if isinstance(data, Host) else data
    for dim, start, end, step in zip(dims, first, last, by, strict=True):
        made = _cut(node, made, dim, start, end, step)
    return Host(made, data.dtype) if isinstance(data, Host) else made


def _cut(node: Node, data: Any, dim: int, start: Any, end: Any, step: int) -> Any:
    open_end = isinstance(end, int) and end >= _END
    if step > 0:
        if isinstance(start, int) and start == 0 and open_end and step == 1:
            return data
        return data[(*(slice(None),) * dim, slice(start, None if open_end else end, step))]
    backwards = isinstance(start, int) and start in (-1, _END, 2**63 - 1)
    if step == -1 and backwards and isinstance(end, int) and end <= -_END:
        return np.flip(data, dim) if isinstance(data, np.ndarray) else torch.flip(data, (dim,))
    raise refused(node, f"a Slice from {start} to {end} in steps of {step}")


@operator("GatherElements", reads="axis")
def gather_elements(node: Node, data: Value, index: Value) -> Tensor:
    """One element for each index, along an axis."""
    made, where, axis = tensor(data), tensor(index), node.get("axis", 0)
    return torch.gather(made, axis, _wrapped(where, made.shape[axis]).long())


def _wrapped(index: Tensor, size: Any) -> Tensor:
    """Indices counted from the end as those counted from the start."""
    return torch.where(index < 0, index + size, index)


@operator("GatherND", reads="batch_dims")
def gather_nd(node: Node, data: Value, index: Value) -> Tensor:
    """Slices by tuples of indices, which the last dim of `index` holds."""
    made, where = tensor(data), tensor(index)
    batch = node.get("batch_dims", 0)
    places: list[Tensor] = []
    for dim in range(batch):
        shape = [1] * (where.dim() - 1)
        shape[dim] = made.shape[dim]
        places.append(torch.arange(made.shape[dim]).reshape(shape))
    return made[(*places, *_columns(where))]


def _columns(index: Tensor) -> tuple[Tensor, ...]:
    """The parts of a tensor of tuples."""
    return tuple(index.select(-1, i) for i in range(index.shape[-1]))


@operator("ScatterND", reads="reduction")
def scatter_nd(node: Node, data: Value, index: Value, updates: Value) -> Tensor:
    """A copy with slices written over, or added to."""
    mode = node.get("reduction", "none")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode not in ("none", "add"):
        raise refused(node, f"the reduction {mode} is not built")
    places = _columns(tensor(index))
    return torch.index_put(tensor(data), places, tensor(updates), accumulate=mode == "add")


@operator("ScatterElements", reads="axis reduction")
def scatter_elements(node: Node, data: Value, index: Value, updates: Value) -> Tensor:
    """A copy with single elements written over, or added to, along an axis."""
    mode = node.get("reduction", "none")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    made, axis = tensor(data), node.get("axis", 0)
    where = _wrapped(tensor(index), made.shape[axis]).long()
    if mode == "none":
        return torch.scatter(made, axis, where, tensor(updates))
    if mode == "add":
        return torch.scatter_add(made, axis, where, tensor(updates))
    raise refused(node, f"the reduction {mode} is not built")


@operator("OneHot", reads="axis")
def one_hot(node: Node, index: Value, depth: Value, values: Value) -> Tensor:
    """A new dim with one value at the index and another elsewhere."""
    count = sizes(depth, "the depth of a OneHot")[0]
    off, on = tensor(values).unbind(0)
    where, axis = tensor(index), node.get("axis", -1)
    rank = where.dim() + 1
    shape = [1] * rank
    shape[axis % rank] = count
    hit = torch.arange(count).reshape(shape) == _wrapped(where, count).unsqueeze(axis % rank)
    return torch.where(hit, on, off)


@operator("Trilu", reads="upper")
def trilu(node: Node, x: Value, k: Value = None) -> Tensor:
    """The triangle above or below a diagonal, zeros elsewhere."""
    diagonal = 0 if k is None else sizes(k, "the diagonal of a Trilu")[0]
    return (torch.triu if node.get("upper", 1) else torch.tril)(tensor(x), diagonal)


@operator("CumSum", reads="exclusive reverse")
def cumsum(node: Node, x: Value, axis: Value) -> Tensor:
    """Running sums along an axis."""
    made, dim = tensor(x), sizes(axis, "the axis of a CumSum")[0]
    if node.get("reverse", 0):
        made = made.flip(dim)
    total = torch.cumsum(made, dim, dtype=made.dtype)
    if node.get("exclusive", 0):
        total = total - made
    return total.flip(dim) if node.get("reverse", 0) else total


@operator("TopK", reads="axis largest sorted")
def top_k(node: Node, x: Value, k: Value) -> tuple[Tensor, Tensor]:
    """The greatest or least elements along an axis, with their places."""
    count = sizes(k, "the count of a TopK")[0]
    largest, ordered = bool(node.get("largest", 1)), bool(node.get("sorted", 1))
    made = torch.topk(tensor(x), count, node.get("axis", -1), largest, ordered)
    return made[0], made[1]


@operator("ArgMax", "ArgMin", reads="axis keepdims select_last_index")
def arg(node: Node, x: Value) -> Tensor:
    """The place of the greatest or least element along an axis."""
    if node.get("select_last_index", 0):
        raise refused(node, "the last of equal elements is asked for")
    function = torch.argmax if node.operator == "ArgMax" else torch.argmin
    return function(tensor(x), node.get("axis", 0), keepdim=bool(node.get("keepdims", 1)))
