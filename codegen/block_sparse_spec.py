"""`BlockSparseSpec`: attention over lists of key blocks, as a frozen value that prints as one line.

    block_sparse{heads=32 kv_heads=8 head_dim=128 v_dim=128 scale=0.0883
                 pattern=windowed(left=1024,sink=64)}

(on one line). The pattern says which blocks are read; where estimates decide that at run time, it
is `given`. Its sizes of blocks are part of what is computed, tile sizes of a kernel are not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.codegen.block_lists import UNBOUNDED, BlockGrid, BlockLists, from_mask, side_by_side
from attnopt.compiler import text
from attnopt.compiler.errors import Problem


@dataclass(frozen=True)
class Pattern(ABC):
    """A class of block patterns. Subclasses are frozen dataclasses with a `name`."""

    name: ClassVar[str]
    token_level: ClassVar[bool] = False  # whether partial blocks are cut by a window

    @abstractmethod
    def masks(self, grid: BlockGrid, units: int) -> tuple[Tensor, Tensor | None, list[int]]:
        """The blocks that are kept, bool [patterns, rows, columns]; spans [patterns, 2] of windows
        or None; and the pattern of each of `units` heads."""

    def lists(self, grid: BlockGrid, units: int, together: int = 1) -> BlockLists:
        """The pattern's lists for a grid."""
        mask, spans, pattern_of = self.masks(grid, units)
        return from_mask(
            mask, grid, torch.tensor(pattern_of, dtype=torch.int32), spans=spans, together=together
        )


@dataclass(frozen=True)
class Dense(Pattern):
    """All blocks."""

    name: ClassVar[str] = "dense"

    def masks(self, grid: BlockGrid, units: int) -> tuple[Tensor, Tensor | None, list[int]]:
        return _everything(grid), None, [0] * units


@dataclass(frozen=True)
class Windowed(Pattern):
    """The last `left` keys (itself included) and the first `sink` keys, to the token.

    The first `full` units read everything: DuoAttention (Xiao et al. 2024) with retrieval heads in
    front of streaming heads, whose sizes there are sink 64 and left 256.
    """

    left: int = 256
    sink: int = 64
    full: int = 0
    name: ClassVar[str] = "windowed"
    token_level: ClassVar[bool] = True

    def masks(self, grid: BlockGrid, units: int) -> tuple[Tensor, Tensor | None, list[int]]:
        spans = [[self.left, self.sink]] + [[UNBOUNDED, 0]] * (self.full > 0)
        mask = _everything(grid).repeat(len(spans), 1, 1)
        full = min(self.full, units)
        return mask, torch.tensor(spans), [1] * full + [0] * (units - full)


@dataclass(frozen=True)
class Strided(Pattern):
    """S2-Attention (Lin et al. 2024): the last `local` key blocks and every `stride`-th one,
    counted from the start of the sequence and shifted from unit to unit, so that together units
    read all.

    A key block that a query no longer reads is never read by a later one, hence can leave a cache.
    The last `dense` units read everything.
    """

    local: int = 16
    stride: int = 8
    dense: int = 0
    name: ClassVar[str] = "strided"

    def masks(self, grid: BlockGrid, units: int) -> tuple[Tensor, Tensor | None, list[int]]:
        step = max(1, self.stride // units)
        shift_of = [unit * step % self.stride for unit in range(units - self.dense)]
        shifts = sorted(set(shift_of))
        block = torch.arange(grid.columns)
        first = (torch.arange(grid.rows) * grid.query_block + grid.offset) // grid.key_block
        near = block > first[:, None] - self.local
        far = (block + torch.tensor(shifts, dtype=torch.int64)[:, None]) % self.stride == 0
        mask = near[None] | far[:, None]
        if self.dense:
            mask = torch.cat((mask, _everything(grid)))
        return mask, None, [shifts.index(shift) for shift in shift_of] + [len(shifts)] * self.dense


@dataclass(frozen=True)
class Scattered(Pattern):
    """A share `density` of each query block's key blocks, at least one, drawn at random: what
    selection by content looks like to a kernel. Under a causal mask the last readable block is
    among them. There are `patterns` drawings, one per unit where it is 0."""

    density: float = 0.05
    patterns: int = 0
    seed: int = 0
    name: ClassVar[str] = "scattered"

    def masks(self, grid: BlockGrid, units: int) -> tuple[Tensor, Tensor | None, list[int]]:
        patterns = self.patterns or units
        some, _ = grid.read()
        drawn = torch.rand(
            patterns, grid.rows, grid.columns, generator=torch.Generator().manual_seed(self.seed)
        )
        if grid.causal:
            last = (some.long() * torch.arange(1, grid.columns + 1)).argmax(2, keepdim=True)
            drawn.scatter_(2, last.expand(patterns, -1, -1), 2.0)
        drawn = drawn.masked_fill(~some, -1.0)
        wanted = (some.sum(2, keepdim=True) * self.density).round().clamp(min=1)
        rank = drawn.argsort(2, descending=True).argsort(2)
        return rank < wanted, None, [unit % patterns for unit in range(units)]


@dataclass(frozen=True)
class Given(Pattern):
    """Lists made elsewhere, e.g. from estimates of each prompt; for tuning they are random, with
    about this `density`."""

    density: float = 0.2
    name: ClassVar[str] = "given"

    def masks(self, grid: BlockGrid, units: int) -> tuple[Tensor, Tensor | None, list[int]]:
        return Scattered(self.density).masks(grid, units)


PATTERNS: dict[str, type[Pattern]] = {
    kind.name: kind for kind in (Dense, Windowed, Strided, Scattered, Given)
}


@dataclass(frozen=True)
class BlockSparseSpec:
    """Attention over lists of key blocks.

    Fields as in `AttentionSpec`. `query_block` x `key_block` is the size of the pattern's blocks.
    `per_head` gives each query head a pattern of its own; otherwise the query heads that share a
    key/value head share its pattern. Raises `Problem` A817 on sizes that make no sense.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    scale: float
    pattern: Pattern = Dense()
    causal: bool = True
    query_block: int = 128
    key_block: int = 64
    softcap: float = 0.0
    per_head: bool = False
    lse: bool = False
    name: str = field(default="block_sparse", init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.heads, self.kv_heads, self.head_dim, self.v_dim) < 1:
            raise Problem("A817", f"a block-sparse spec needs positive sizes, got {self}")
        if self.heads % self.kv_heads:
            raise Problem(
                "A817", f"{self.heads} query heads cannot share {self.kv_heads} key/value heads"
            )
        BlockGrid(1, 1, self.query_block, self.key_block)

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def units(self) -> int:
        """Heads that have a pattern of their own."""
        return self.heads if self.per_head else self.kv_heads

    @property
    def text(self) -> str:
        """The spec as one line; `parse_block_sparse` reads it back."""
        return text.dump(self)

    def grid(self, queries: int, keys: int) -> BlockGrid:
        """The grid of blocks of `queries` that end where `keys` end."""
        return BlockGrid(
            queries, keys, self.query_block, self.key_block, keys - queries, self.causal
        )

    def lists(self, queries: int, keys: int, itemsize: int = 2) -> BlockLists:
        """The lists of the pattern at these sizes, on the CPU; made once."""
        return _lists(self, queries, keys, itemsize)


def parse_block_sparse(line: str) -> BlockSparseSpec:
    """Read a spec from its text. Raises `Problem` A601 on text that is not one."""
    call = text.parse(line)
    if call.name != "block_sparse":
        raise Problem("A601", f"expected block_sparse{{...}}, got `{line}`")
    values: dict[str, Any] = dict(call.values)
    if "pattern" in values:
        given = values["pattern"]
        found = given if isinstance(given, text.Call) else text.Call(str(given), {})
        if found.name not in PATTERNS:
            raise Problem(
                "A601", f"unknown pattern `{found.name}`",
                help=f"known patterns: {', '.join(PATTERNS)}",
            )  # fmt: skip
        values["pattern"] = text.build(PATTERNS[found.name], found.values, found.name)
    return text.build(BlockSparseSpec, values, "block_sparse")


def _everything(grid: BlockGrid) -> Tensor:
    return torch.ones(1, grid.rows, grid.columns, dtype=torch.bool)


@lru_cache(maxsize=16)
def _lists(spec: BlockSparseSpec, queries: int, keys: int, itemsize: int) -> BlockLists:
    together = side_by_side(keys, spec.head_dim + spec.v_dim, itemsize)
    if spec.per_head:
        together *= spec.group
    return spec.pattern.lists(spec.grid(queries, keys), spec.units, together)
