"""`weightless`: build a model of any size without memory for its weights.

Every parameter becomes one number seen through a view of the wanted shape (stride 0), so the model
is an ordinary CPU model to `torch.export`, while buffers such as the frequencies of a rotary
embedding keep their true values, which the probes read; on the meta device they would be lost. The
model must not be run for its results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Unwritten(TorchFunctionMode):
    """Initialisers and in-place writes leave parameters without memory as they are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        target = args[0] if args else (kwargs or {}).get("tensor")
        if _writes(func) and isinstance(target, Tensor) and is_weightless(target):
            return target
        return func(*args, **(kwargs or {}))


def _writes(func: Callable[..., Any]) -> bool:
    """By torch's convention names of functions that write in place end in one underscore."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def is_weightless(value: Tensor) -> bool:
    """Whether a tensor is one number seen through a larger shape."""
    return value.numel() > 1 and not any(value.stride())


@contextmanager
def weightless() -> Iterator[None]:
    """Modules built inside get parameters of the right shape and dtype that take no memory."""
    register = nn.Module.register_parameter

    def light(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param if param is None or is_weightless(param) else _light(param))

    nn.Module.register_parameter = light  # type: ignore[method-assign]
    try:
        with torch.no_grad(), _Unwritten():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _light(param: nn.Parameter) -> nn.Parameter:
    value = torch.ones((), dtype=param.dtype).expand(param.shape)
    return nn.Parameter(value, requires_grad=False)
