"""Devices as torch calls them: which can be used, and graphs that are moved to one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from attnopt.compiler.errors import Problem

CPU = torch.device("cpu")


def usable(name: str | torch.device) -> torch.device:
    """The device of this name, such as "cpu", "cuda" or "cuda:1", with its number.

    Raises `Problem` A411 where torch does not know it, cannot use it, or it has no float64, in
    which rewrites are compared.
    """
    try:
        found = torch.zeros(1, dtype=torch.float64, device=name)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise _unusable(name, (str(error).splitlines() or [type(error).__name__])[0]) from error
    if found.is_meta:
        raise _unusable(name, "it holds no values")
    return found.device


def _unusable(name: str | torch.device, why: str) -> Problem:
    return Problem(
        "A411", f"the device `{name}` cannot be used here", why=why,
        help="give one that torch can use and that has float64: cpu, cuda, or cuda:1",
    )  # fmt: skip


def move_graph(graph: fx.Graph, device: torch.device) -> None:
    """Have the nodes of a graph make their tensors on a device, and know them there."""

    def there(leaf: Any) -> Any:
        return device if isinstance(leaf, torch.device) else leaf

    def known(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    for node in graph.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), there)
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(known, node.meta["val"])


def moved(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A module with all that its graph makes on a device, itself; its weights are moved in place,
    with all that shares them."""
    if device != CPU:
        move_graph(module.graph, device)
        module.to(device).recompile()
    return module
