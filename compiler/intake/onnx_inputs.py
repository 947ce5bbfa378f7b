"""Example inputs for an ONNX graph, from the names, types and sizes of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.inputs import missing
from attnopt.compiler.onnx.graph import Graph, Input, Node

BATCH, LENGTH = 2, 64
_SEED = 0
_CACHES = ("past", "cache")
_PASSED_ON = ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze")


def made_up(graph: Graph, batch: int | None, length: int | None, where: str) -> dict[str, Tensor]:
    """Random inputs by name (fixed seed): tokens below the size of the table that reads them, masks
    of ones, positions counted up.

    Raises `Problem` A111 where sizes cannot be guessed, A116 for sizes below 1.
    """
    rows, columns = BATCH if batch is None else batch, LENGTH if length is None else length
    if rows < 1 or columns < 1:
        raise Problem("A116", f"batch {batch} and length {length} must be at least 1")
    draw = torch.Generator().manual_seed(_SEED)
    readers, names = graph.readers(), graph.input_names
    sizes: dict[str, int] = {}
    made: dict[str, Tensor] = {}
    for item in graph.inputs:
        open_dims = [dim for dim, size in enumerate(item.shape) if isinstance(size, str)]
        images = len(item.shape) >= 4 and any(dim > 0 for dim in open_dims)
        if images or any(word in item.name.lower() for word in _CACHES):
            raise missing(f"{where}: {item.name}")
        shape = [_size(size, dim, rows, columns, sizes) for dim, size in enumerate(item.shape)]
        below = _below(item.name, graph, readers)
        made[names[item.name]] = _values(item, shape, below, draw)
    return made


def _size(size: int | str, dim: int, rows: int, columns: int, sizes: dict[str, int]) -> int:
    """A number for a dim: the batch leads, whatever else is open is a length."""
    if isinstance(size, int):
        return size
    leads = dim == 0 or "batch" in size.lower()
    wanted = rows if leads else columns
    return sizes.setdefault(size, wanted) if size else wanted


def _values(item: Input, shape: list[int], below: int | None, draw: torch.Generator) -> Tensor:
    name = item.name.lower()
    if item.dtype.is_floating_point:
        return torch.randn(shape, generator=draw).to(item.dtype)
    if item.dtype == torch.bool or "mask" in name:
        return torch.ones(shape, dtype=item.dtype)
    if "position" in name and shape:
        return torch.arange(shape[-1]).expand(shape).to(item.dtype).clone()
    if "type" in name or "segment" in name:
        return torch.zeros(shape, dtype=item.dtype)
    return torch.randint(0, below or 2, shape, generator=draw).to(item.dtype)


def _below(name: str, graph: Graph, readers: dict[str, list[Node]]) -> int | None:
    """How many rows the smallest table has that an input indexes."""
    found: list[int] = []
    seen, waiting = set[str](), [name]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        for node in readers.get(value, ()):
            if node.operator in _PASSED_ON and node.inputs[0] == value:
                waiting += node.outputs
            table = _table(node, value)
            if table in graph.constants:
                found.append(graph.constants[table].shape[0])
    return min(found, default=None)


def _table(node: Node, index: str) -> str:
    """The name of what a node looks `index` up in, or ""."""
    if node.operator == "Gather" and node.inputs[1] == index and not node.get("axis", 0):
        return node.inputs[0]
    if node.operator == "EmbedLayerNormalization" and node.inputs[0] == index:
        return node.inputs[2]
    return ""
