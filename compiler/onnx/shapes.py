"""Operators that change shapes, and those that make tensors from shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnopt.compiler.onnx.dtypes import torch_dtype
from attnopt.compiler.onnx.graph import Node
from attnopt.compiler.onnx.host import MOST, Host, Value, constant, host, sizes, tensor
from attnopt.compiler.onnx.table import operator, refused


@operator("Constant", reads="value_int value_float value_ints value_floats")
def constant_node(node: Node) -> Value:
    """A constant that is written as a node, other than by a tensor."""
    for name, dtype in (("value_int", torch.int64), ("value_float", torch.float32)):
        if name in node.attributes:
            return host(node.get(name), dtype)
    for name, dtype in (("value_ints", torch.int64), ("value_floats", torch.float32)):
        if name in node.attributes:
            return constant(torch.tensor(node.get(name), dtype=dtype))
    raise refused(node, "its value is no tensor and no number")


@operator("Shape", reads="start end")
def shape(node: Node, x: Value) -> Host:
    """The sizes of a tensor, or of some of its dims."""
    assert x is not None
    found = list(x.shape)[node.get("start", 0) : node.get("end")]
    return host(found, torch.int64, (len(found),))


@operator("Size")
def size(node: Node, x: Value) -> Host:
    """How many elements a tensor has."""
    assert x is not None
    return host(math.prod(x.shape), torch.int64)


@operator("Reshape", reads="allowzero")
def reshape(node: Node, x: Value, wanted: Value) -> Value:
    """Another shape; 0 keeps a dim's size unless `allowzero` is set, -1 is what is left."""
    assert x is not None
    target = sizes(wanted, "the shape of a Reshape")
    if not node.get("allowzero", 0):
        target = [x.shape[i] if isinstance(s, int) and s == 0 else s for i, s in enumerate(target)]
    if isinstance(x, Host):
        return Host(x.array.reshape([int(s) for s in target]), x.dtype)
    return torch.reshape(x, target)


@operator("Flatten", reads="axis")
def flatten(node: Node, x: Value) -> Tensor:
    """Two dims: those before `axis` and those from it on."""
    made = tensor(x)
    axis = node.get("axis", 1)
    axis = axis + made.dim() if axis < 0 else axis
    return made.reshape(math.prod(made.shape[:axis]), math.prod(made.shape[axis:]))


@operator("Transpose", reads="perm")
def transpose(node: Node, x: Value) -> Value:
    """Dims in another order; reversed where none is given."""
    assert x is not None
    order = node.get("perm") or list(reversed(range(len(x.shape))))
    if isinstance(x, Host):
        return Host(x.array.transpose(order), x.dtype)
    moved = [i for i, source in enumerate(order) if i != source]
    if len(moved) == 2:
        return torch.transpose(x, *moved)
    return torch.permute(x, order)


@operator("Squeeze")
def squeeze(node: Node, x: Value, axes: Value = None) -> Value:
    """Without dims of size 1."""
    assert x is not None
    rank = len(x.shape)
    if axes is None:
        dims = [i for i, s in enumerate(x.shape) if isinstance(s, int) and s == 1]
    else:
        dims = [int(a) % rank for a in sizes(axes, "the axes of a Squeeze")]
    if isinstance(x, Host):
        return Host(x.array.squeeze(tuple(dims)), x.dtype)
    for dim in sorted(dims, reverse=True):
        x = torch.squeeze(x, dim)
    return x


@operator("Unsqueeze")
def unsqueeze(node: Node, x: Value, axes: Value) -> Value:
    """With new dims of size 1."""
    assert x is not None
    added = sizes(axes, "the axes of an Unsqueeze")
    rank = len(x.shape) + len(added)
    dims = sorted(int(a) % rank for a in added)
    if isinstance(x, Host):
        return Host(np.expand_dims(x.array, tuple(dims)), x.dtype)
    for dim in dims:
        x = torch.unsqueeze(x, dim)
    return x


@operator("Concat", reads="axis")
def concat(node: Node, *values: Value) -> Value:
    """Tensors joined along an axis."""
    axis = int(node.get("axis"))
    parts = [value for value in values if value is not None]
    if all(isinstance(part, Host) for part in parts):
        joined = np.concatenate([part.array for part in parts], axis)  # type: ignore[union-attr]
        if joined.size <= MOST:
            return Host(joined, parts[0].dtype)
    return torch.cat([tensor(part) for part in parts], axis)


@operator("Split", reads="axis num_outputs")
def split(node: Node, x: Value, lengths: Value = None) -> tuple[Value, ...]:
    """A tensor cut along an axis, by lengths or into equal parts."""
    assert x is not None
    axis = node.get("axis", 0)
    if lengths is not None:
        parts = sizes(lengths, "the lengths of a Split")
    else:
        count = node.get("num_outputs", len(node.outputs))
        whole = x.shape[axis]
        each = -(-whole // count)
        parts = [each] * (count - 1) + [whole - each * (count - 1)]
    if isinstance(x, Host):
        cuts = list(np.cumsum([int(p) for p in parts])[:-1])
        return tuple(Host(part, x.dtype) for part in np.split(x.array, cuts, axis))
    if len(parts) == 1:
        return (x,)
    return tuple(torch.split(x, parts, axis))


@operator("Expand")
def expand(node: Node, x: Value, wanted: Value) -> Value:
    """A tensor broadcast together with a shape."""
    target = sizes(wanted, "the shape of an Expand")
    made = tensor(x)
    both = broadcast(list(made.shape), target)
    if isinstance(x, Host) and all(isinstance(s, int) for s in both) and math.prod(both) <= MOST:
        return Host(np.broadcast_to(x.array, both), x.dtype)
    return made.expand(both)


def broadcast(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    """The shape that two shapes give together; a symbol stands for more than 1."""
    rank = max(len(a), len(b))
    left, right = ([1] * (rank - len(s)) + list(s) for s in (a, b))
    return [
        y if isinstance(x, int) and x == 1 else x if isinstance(y, int) and y == 1 else _same(x, y)
        for x, y in zip(left, right, strict=True)
    ]


def _same(x: Any, y: Any) -> Any:
    return x if isinstance(x, int) else y


@operator("Tile")
def tile(node: Node, x: Value, times: Value) -> Value:
    """A tensor repeated along its dims."""
    counts = sizes(times, "the repeats of a Tile")
    known = isinstance(x, Host) and all(isinstance(n, int) for n in counts)
    if isinstance(x, Host) and known and x.array.size * math.prod(counts) <= MOST:
        return Host(np.tile(x.array, counts), x.dtype)
    return tensor(x).repeat(counts)


@operator("ConstantOfShape", reads="value")
def constant_of_shape(node: Node, wanted: Value) -> Value:
    """A tensor of one value."""
    target = sizes(wanted, "the shape of a ConstantOfShape")
    given: Host = node.get("value") or host([0], torch.float32)
    dtype, number = given.dtype, given.number
    known = all(isinstance(s, int) for s in target) and math.prod(target) <= MOST
    if known and (not dtype.is_floating_point or not target):
        return host([number] * math.prod(target), dtype, target)
    return torch.full(target, number, dtype=dtype)


@operator("Range")
def arange(node: Node, start: Value, limit: Value, delta: Value) -> Tensor:
    """Numbers from `start` up to `limit` in steps."""
    numbers = [sizes(value, "a bound of a Range")[0] for value in (start, limit, delta)]
    assert start is not None
    if numbers[0] == 0 and numbers[2] == 1:
        return torch.arange(numbers[1], dtype=start.dtype)
    return torch.arange(*numbers, dtype=start.dtype)


@operator("EyeLike", reads="dtype k")
def eye_like(node: Node, x: Value) -> Tensor:
    """Ones on a diagonal of a matrix."""
    made, number = tensor(x), node.get("dtype")
    dtype = made.dtype if number is None else torch_dtype(int(number), node.name)
    rows, columns = (torch.arange(s) for s in made.shape)
    hit = (columns[None, :] - rows[:, None]) == int(node.get("k", 0))
    return hit.to(dtype)


@operator("Pad", reads="mode")
def pad(
    node: Node, x: Value, pads: Value, filler: Value = None, axes: Value = None
) -> Tensor:  # fmt: skip
    """Elements added at the ends of dims, or cut off where negative."""
    made, amounts = tensor(x), sizes(pads, "the lengths of a Pad")
    rank = made.dim()
    dims = range(rank) if axes is None else [int(a) % rank for a in sizes(axes, "axes")]
    ends = [(0, 0)] * rank
    for i, dim in enumerate(dims):
        ends[dim] = (amounts[i], amounts[i + len(amounts) // 2])
    while ends and ends[0] == (0, 0):
        ends.pop(0)
    flat = [amount for pair in reversed(ends) for amount in pair]
    mode = node.get("mode", "constant")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if not flat:
        return made
    if mode == "constant":
        number = 0 if filler is None else sizes(filler, "the filler of a Pad")[0]
        return torch.nn.functional.pad(made, flat, value=number)
    known = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    return torch.nn.functional.pad(made, flat, mode=known[mode])
