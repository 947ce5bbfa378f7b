"""Where a run works, and what its speeds are of: the CPU or a GPU at hand, or a GPU that is not
here, for which they are estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnopt.codegen.target import CPU as CPU_TARGET
from attnopt.codegen.target import at_hand
from attnopt.compiler.device import CPU, moved, usable
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded


@dataclass(frozen=True)
class Place:
    """A run's `device`, where the model runs and is trained, and the name of the `target` that its
    speeds are of; `timed` says that the one is the other."""

    device: torch.device = CPU
    target: str = CPU_TARGET
    timed: bool = True

    @staticmethod
    def of(device: str, wanted: str | None) -> Place:
        """The place by the names that were given: a device of torch, and a target or None, the
        device itself. Raises `Problem` A401 for an unknown target, and A411 for a device that
        cannot be used, or is not the target."""
        found = usable(device)
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


def original(loaded: Loaded, device: torch.device = CPU) -> Callable[..., Any]:
    """The model as given, in eval mode, on a device; a module in memory is moved itself (see
    `at_home`), with all that shares its weights."""
    if loaded.module is not None:
        return loaded.module if device == CPU else loaded.module.to(device)
    assert loaded.exported is not None
    return moved(loaded.exported.module(), device)


@contextmanager
def at_home(model: object) -> Iterator[None]:
    """Have a module in memory on the CPU, where it is read, and put it back in the end."""
    before = device_of(model)
    if before is None or before.type == "meta":
        yield
        return
    assert isinstance(model, nn.Module)
    try:
        model.to(CPU)
        yield
    finally:
        model.to(before)


def device_of(model: object) -> torch.device | None:
    """Where a module in memory is; None for one without weights, and for what is no module.

    Raises `Problem` A411 where it is on several devices.
    """
    held = () if not isinstance(model, nn.Module) else (*model.parameters(), *model.buffers())
    found = {tensor.device: None for tensor in held}
    if len(found) > 1:
        raise Problem(
            "A411", f"the model's weights are on {' and '.join(map(str, found))}",
            why="it is read, fitted and timed on one device", help="move it to one, with .to()",
        )  # fmt: skip
    return next(iter(found), None)
