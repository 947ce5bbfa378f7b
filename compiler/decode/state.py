"""What a decoder remembers of the tokens that it has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from attnopt.compiler.native.memory import Memory

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

    def read(self, tokens: int) -> None:
        """Take note that so many more tokens were read."""
        self.length += tokens
        self.reached = max(self.reached, self.length)

    @property
    def bytes(self) -> int:
        """Bytes that the caches take."""
        return sum(x.nbytes for cache in self.caches for x in cache)


class Kind(Protocol):
    """What a cache is: see `caches`, `latents` and `convolutions`."""

    reads_all: ClassVar[bool]

    @property
    def widths(self) -> tuple[tuple[int, int], ...]: ...

    def slots(self, capacity: int) -> int: ...


def empty_caches(
    kinds: Sequence[tuple[Kind, torch.dtype]],
    batch: int,
    capacity: int,
    device: torch.device,
    memory: Memory,
) -> list[tuple[Tensor, ...]]:
    """Caches of these kinds and dtypes, of zeros where they are read whole; on a CPU of the
    memory, which leaves any numbers in the others."""
    sizes = [
        [((batch, heads, kind.slots(capacity), dim), dtype) for heads, dim in kind.widths]
        for kind, dtype in kinds
    ]
    if device.type != "cpu":
        return [tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in cache)
                for cache in sizes]  # fmt: skip
    taken = iter(memory.tensors([size for cache in sizes for size in cache]))
    made = [tuple(next(taken) for _ in cache) for cache in sizes]
    for (kind, _), cache in zip(kinds, made, strict=True):
        for x in cache if kind.reads_all else ():
            x.zero_()
    return made
