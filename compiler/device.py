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


def finish(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


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


class Carried:
    """Tensors on a device by those that they were made of: each goes there once, so that what
    shares memory here shares it there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known = dict[Any, tuple[Tensor, Tensor]]()

    def __call__(self, value: Tensor) -> Tensor:
        """The tensor there; itself where it is there already."""
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if place not in self._known:
            self._known[place] = (value, value.detach().to(self.device))
        return self._known[place][1]


def moved(module: fx.GraphModule, there: Carried) -> fx.GraphModule:
    """A module with its weights, and all that its graph makes, on a device, itself; tensors that
    others share with it stay where they are."""
    if there.device == CPU:
        return module
    for part in module.modules():
        for name, held in part.named_parameters(recurse=False):
            part.register_parameter(name, torch.nn.Parameter(there(held), held.requires_grad))
        for name, value in part.named_buffers(recurse=False):
            part._buffers[name] = there(value)
    move_graph(module.graph, there.device)
    module.recompile()
    return module
