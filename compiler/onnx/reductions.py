"""Reductions along axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.onnx.graph import Node
from attnopt.compiler.onnx.host import Host, Value, host, sizes, tensor
from attnopt.compiler.onnx.table import operator

_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, dims, keep: x.mean(dims, keepdim=keep),
    "ReduceSum": lambda x, dims, keep: x.sum(dims, keepdim=keep, dtype=x.dtype),
    "ReduceMax": lambda x, dims, keep: x.amax(dims, keepdim=keep),
    "ReduceMin": lambda x, dims, keep: x.amin(dims, keepdim=keep),
    "ReduceL1": lambda x, dims, keep: x.abs().sum(dims, keepdim=keep, dtype=x.dtype),
    "ReduceL2": lambda x, dims, keep: torch.linalg.vector_norm(x, 2, dims, keepdim=keep),
    "ReduceSumSquare": lambda x, dims, keep: (x * x).sum(dims, keepdim=keep, dtype=x.dtype),
    "ReduceLogSumExp": lambda x, dims, keep: torch.logsumexp(x, dims, keepdim=keep),
    "ReduceLogSum": lambda x, dims, keep: x.sum(dims, keepdim=keep).log(),
}
_OF_NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "ReduceSum": lambda a, b: a + b,
    "ReduceProd": lambda a, b: a * b,
    "ReduceMax": torch.sym_max,
    "ReduceMin": torch.sym_min,
}


@operator(*_REDUCTIONS, "ReduceProd", reads="axes keepdims noop_with_empty_axes")
def reduction(node: Node, x: Value, axes: Value = None) -> Value:
    """A reduction along some axes, or all; they are an attribute before opset 18."""
    assert x is not None
    given = node.get("axes") if axes is None else sizes(axes, "the axes of a reduction")
    keep = bool(node.get("keepdims", 1))
    rank = len(x.shape)
    if not given and node.get("noop_with_empty_axes", 0):
        return x
    dims = [int(a) % rank for a in given] if given else list(range(rank))
    if isinstance(x, Host) and node.operator in _OF_NUMBERS and len(dims) == rank and x.numbers:
        return _of_numbers(node, x, keep)
    made = tensor(x)
    if node.operator != "ReduceProd":
        return _REDUCTIONS[node.operator](made, dims, keep)
    for dim in sorted(dims, reverse=True):
        made = made.prod(dim, keepdim=keep, dtype=made.dtype)
    return made


def _of_numbers(node: Node, x: Host, keep: bool) -> Host:
    total = x.numbers[0]
    for number in x.numbers[1:]:
        total = _OF_NUMBERS[node.operator](total, number)
    return host([total], x.dtype, (1,) * len(x.shape) if keep else ())
