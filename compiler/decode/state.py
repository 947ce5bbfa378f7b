"""What a decoder remembers of the tokens that it has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnopt.compiler.native.pages import Room

if TYPE_CHECKING:
    from attnopt.compiler.decode.single import Known


@dataclass
class State:
    """The tokens read so far: caches, tables, and how many tokens there are.

    `masks` are the inputs `[batch, capacity]` that say which positions are real. `length` may be
    lowered with `rewind`; `reached` is the most that it ever was. `compiled` is what `single`
    knows of it.
    """

    batch: int
    capacity: int
    caches: list[tuple[Tensor, ...]]
    tables: list[Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    length: int = 0
    reached: int = 0
    compiled: Known | None = field(default=None, repr=False)

    def replace(self, caches: list[tuple[Tensor, ...]], tables: list[Tensor]) -> None:
        """Go on with other caches and tables; what compiled steps kept of these is let go."""
        self.caches, self.tables, self.compiled = caches, tables, None

    @property
    def bytes(self) -> int:
        """Bytes that the caches take."""
        return sum(x.nbytes for cache in self.caches for x in cache)


def empty_caches(
    sizes: Sequence[Sequence[tuple[tuple[int, ...], torch.dtype]]], device: torch.device, room: Room
) -> list[tuple[Tensor, ...]]:
    """Zeros of these shapes and dtypes; on a CPU of the room."""
    if device.type != "cpu":
        return [tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in cache)
                for cache in sizes]  # fmt: skip
    made = iter(room.zeros([size for cache in sizes for size in cache]))
    return [tuple(next(made) for _ in cache) for cache in sizes]
