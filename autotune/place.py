"""Where a run works, and what its speeds are of: the CPU or a GPU at hand, or a GPU that is not
here, for which they are estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from torch.utils._pytree import tree_map_only

from attnopt.codegen.target import CPU as CPU_TARGET
from attnopt.codegen.target import at_hand, target
from attnopt.compiler.device import CPU, Carried, moved, usable
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.optimized import Optimized


@dataclass(frozen=True)
class Place:
    """A run's `device`, where the model runs and is trained, and the name of the `target` that its
    speeds are of; `timed` says that the one is the other."""

    device: torch.device = CPU
    target: str = CPU_TARGET
    timed: bool = True

    @staticmethod
    def of(device: str | None, wanted: str | None) -> Place:
        """The place by the names that were given: a device of torch (None: the target where it is
        here, else the CPU), and a target (None: the device). Raises `Problem` A401 for an unknown
        target, and A411 for a device that cannot be used, or is not the target."""
        found = usable(device or ("cuda" if _is_here(wanted) else CPU))
        if found.type == "cpu":
            return Place(found, wanted or CPU_TARGET, wanted in (None, CPU_TARGET))
        if wanted == CPU_TARGET:
            raise Problem(
                "A411", f"--target cpu cannot be timed with the model on {found}",
                help="leave out --target, or --device",
            )  # fmt: skip
        here = at_hand(found.index or 0).name if found.type == "cuda" else None
        if wanted is None and here is None:
            raise Problem(
                "A411", f"no figures are known of the device {found}",
                help="name the GPU that speeds are to be estimated for, with --target",
            )  # fmt: skip
        name = wanted or str(here)
        return Place(found, name, name == here)


def _is_here(wanted: str | None) -> bool:
    """Whether a target is the first GPU at hand."""
    if wanted is None or wanted == CPU_TARGET or not torch.cuda.is_available():
        return False
    return at_hand().name == target(wanted).name


def read_at_home(loaded: Loaded) -> Loaded:
    """A loaded model with its example inputs on the CPU, and an exported program there too."""
    args, kwargs = tree_map_only(Tensor, home, (loaded.args, loaded.kwargs))
    exported = loaded.exported
    if exported is not None and any(x.device != CPU for x in exported.state_dict.values()):
        exported = move_to_device_pass(exported, "cpu")
    return replace(loaded, args=args, kwargs=kwargs, exported=exported)


def home(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, unless it has no values."""
    return tensor if tensor.is_meta else tensor.cpu()


def original(loaded: Loaded, there: Carried) -> Callable[..., Any]:
    """The model as given, in eval mode, on a device; a module in memory is moved itself, and back
    by `at_home`, so that what shares its weights may be moved with it."""
    if loaded.module is not None:
        return loaded.module if there.device == CPU else loaded.module.to(there.device)
    assert loaded.exported is not None
    return moved(loaded.exported.module(), there)


class Facing:
    """A model on a device as a metric sees it that knows of none: it takes inputs of the CPU, and
    its outputs are there. All else is the model's own."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs on the CPU."""
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(self._device), (args, kwargs))
        return tree_map_only(Tensor, Tensor.cpu, self._model(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def facing(model: Any) -> Any:
    """The model, as `Facing` where it is not on the CPU."""
    found = model.device if isinstance(model, Optimized) else device_of(model)
    return model if found in (None, CPU) else Facing(model, found)


@contextmanager
def at_home(model: object) -> Iterator[None]:
    """Have a module in memory on the CPU, where it is read, and put it back in the end."""
    before = device_of(model)
    if before is None:
        yield
        return
    assert isinstance(model, nn.Module)
    try:
        if before != CPU:
            model.to(CPU)
        yield
    finally:
        if {x.device for x in (*model.parameters(), *model.buffers())} != {before}:
            model.to(before)


def device_of(model: object) -> torch.device | None:
    """Where a module in memory is; None for one without weights, or without their values, and for
    what is no module.

    Raises `Problem` A411 where it is on several devices.
    """
    held = () if not isinstance(model, nn.Module) else (*model.parameters(), *model.buffers())
    found = {tensor.device: None for tensor in held if not tensor.is_meta}
    if len(found) > 1:
        raise Problem(
            "A411", f"the model's weights are on {' and '.join(map(str, found))}",
            why="it is read, fitted and timed on one device", help="move it to one, with .to()",
        )  # fmt: skip
    return next(iter(found), None)
