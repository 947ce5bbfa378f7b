"""Which key blocks each query block reads, as lists on a device: what block-sparse kernels take.

A pattern is one list per query block, in compressed sparse rows. Within a list the blocks that
every query reads whole come first (no mask is computed there), then the partial ones, each in
ascending order. Several heads may share a pattern. The sizes of the blocks belong to the pattern,
not to the tiles of a kernel: they decide what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.errors import Problem

UNBOUNDED = 2**30  # the span of a pattern without a window; positions may be added to it
_IN_CACHE = 24 * 2**20  # bytes of keys and values that heads running together should stay within


@dataclass(frozen=True)
class BlockGrid:
    """The matrix of scores, cut into blocks of `query_block` x `key_block`.

    Query i stands at position `offset` + i and reads key j <= it where `causal`.
    Raises `Problem` A815 where a size is not positive or a block is not a power of two from 16.
    """

    queries: int
    keys: int
    query_block: int = 128
    key_block: int = 64
    offset: int = 0
    causal: bool = True

    def __post_init__(self) -> None:
        if min(self.queries, self.keys) < 1:
            raise Problem("A815", f"a grid of blocks needs positive sizes, got {self}")
        for size in (self.query_block, self.key_block):
            if size < 16 or size & (size - 1):
                raise Problem("A815", f"a block of {size} tokens", help="a power of two from 16")

    @property
    def rows(self) -> int:
        """Query blocks."""
        return -(-self.queries // self.query_block)

    @property
    def columns(self) -> int:
        """Key blocks."""
        return -(-self.keys // self.key_block)

    def row_sizes(self, device: Any = "cpu") -> Tensor:
        """Queries of each query block, int64 [rows]; the last one may be short."""
        return _sizes(self.queries, self.query_block, device)

    def column_sizes(self, device: Any = "cpu") -> Tensor:
        """Keys of each key block, int64 [columns]."""
        return _sizes(self.keys, self.key_block, device)

    def read(self, spans: Tensor | None = None, device: Any = "cpu") -> tuple[Tensor, Tensor]:
        """Blocks in which some query reads some key, and those in which every query reads every
        key: two bool tensors [patterns or 1, rows, columns].

        `spans` [patterns, 2] holds for each pattern how many keys back a query reads (itself
        included, and as many ahead where not causal) and how many first keys all queries read.
        """
        low = torch.arange(self.rows, device=device)[:, None] * self.query_block + self.offset
        high = torch.clamp(low + self.query_block, max=self.offset + self.queries) - 1
        start = torch.arange(self.columns, device=device)[None, :] * self.key_block
        end = torch.clamp(start + self.key_block, max=self.keys) - 1
        whole = start + self.key_block <= self.keys
        nearest, farthest = low - end, high - start  # of all i - j in the block
        some = (farthest >= 0) if self.causal else torch.ones_like(nearest, dtype=torch.bool)
        every = (nearest >= 0) & whole if self.causal else whole.expand_as(nearest)
        if spans is None:
            return some[None], every[None]
        left, sink = spans.to(device).long()[:, :, None, None].unbind(1)
        near, all_near = nearest < left, farthest < left
        if not self.causal:
            near = near & (-farthest < left)
            all_near = all_near & (-nearest < left)
        return some & (near | (start < sink)), every & (all_near | (end < sink))


@dataclass(frozen=True)
class BlockLists:
    """Lists of key blocks for each pattern and query block; int32 tensors of one device.

    starts `[patterns, rows + 1]`: where in `columns` each list begins and ends.
    partial `[patterns, rows]`: where in `columns` the partial blocks of each list begin.
    columns `[entries]`: key blocks.
    spans `[patterns, 2]`: of partial blocks, see `BlockGrid.read`; None where there is no window.
    pattern_of `[units]` or `[batch, units]`: the pattern of each unit, which is a query head or, so
    that heads can share what they read, a key/value head with its query heads.
    order `[units * rows]` or `[batch, units * rows]`: unit * rows + row, heaviest first.
    """

    grid: BlockGrid
    starts: Tensor
    partial: Tensor
    columns: Tensor
    spans: Tensor | None
    pattern_of: Tensor
    order: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """The tensors that there are, by the names that kernels know them by."""
        names = ("starts", "partial", "columns", "spans", "pattern_of", "order")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def to(self, device: Any) -> BlockLists:
        """The same lists on another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in self.inputs().items()}
        return replace(self, **moved)

    @cached_property
    def scores(self) -> Tensor:
        """Scores computed by one head of each pattern, int64 [patterns]: all pairs of a query and
        a key in the listed blocks."""
        device = self.starts.device
        keys = self.grid.column_sizes(device)[self.columns.long()]
        before = torch.cat((keys.new_zeros(1), keys.cumsum(0)))
        of_row = before[self.starts[:, 1:].long()] - before[self.starts[:, :-1].long()]
        return (of_row * self.grid.row_sizes(device)).sum(1)

    def density(self) -> float:
        """The share of score work: scores of the listed blocks over those of all blocks that a
        query reads from where nothing but `causal` holds. Waits for the device."""
        device = self.starts.device
        some, _ = self.grid.read(device=device)
        sizes = self.grid.row_sizes(device)[:, None] * self.grid.column_sizes(device)
        dense = int((some[0] * sizes).sum())
        return float(self.scores[self.pattern_of.long()].double().mean()) / max(dense, 1)


def from_mask(
    mask: Tensor,
    grid: BlockGrid,
    pattern_of: Tensor | None = None,
    *,
    spans: Tensor | None = None,
    partial: Tensor | None = None,
    capacity: int | None = None,
    together: int = 1,
) -> BlockLists:
    """Lists of the blocks that `mask` (bool [patterns, rows, columns]) keeps.

    Blocks of which no query reads a key are left out. `partial` (bool, broadcast to the mask) marks
    blocks that a kernel's own mask cuts further. Without `pattern_of`, unit u has pattern u.
    `together` is the number of units that `schedule` keeps side by side.

    With `capacity`, an upper bound on the entries of `columns`, the device is not waited for; what
    does not fit is dropped. Raises `Problem` A816 where shapes disagree.
    """
    expected = (grid.rows, grid.columns)
    if mask.ndim != 3 or mask.shape[1:] != expected:
        raise Problem(
            "A816", f"a block mask of shape {tuple(mask.shape)} for {grid}",
            help=f"[patterns, {expected[0]}, {expected[1]}]",
        )  # fmt: skip
    patterns, rows, _ = mask.shape
    if spans is not None and spans.shape != (patterns, 2):
        raise Problem("A816", f"spans of shape {tuple(spans.shape)} for {patterns} patterns")
    some, every = grid.read(spans, mask.device)
    kept = mask & some
    whole = kept & every if partial is None else kept & every & ~partial
    both = torch.stack((whole, kept & ~whole), 2)  # [patterns, rows, whole or partial, columns]
    counts = both.sum(3)
    ends = counts.sum(2).flatten().cumsum(0).reshape(patterns, rows)
    starts = torch.cat((ends - counts.sum(2), ends[:, -1:]), 1)
    middle = starts[:, :-1] + counts[..., 0]
    flat = both.flatten(0, 2)
    if capacity is None:
        columns = flat.nonzero()[:, 1]
    else:
        columns = flat.nonzero_static(size=capacity, fill_value=0)[:, 1]
        starts, middle = starts.clamp(max=capacity), middle.clamp(max=capacity)
    if pattern_of is None:
        pattern_of = torch.arange(patterns, device=mask.device)
    return BlockLists(
        grid, starts.int(), middle.int(), columns.int(), None if spans is None else spans.int(),
        pattern_of.to(mask.device).int(), schedule(starts, pattern_of.to(mask.device), together),
    )  # fmt: skip


def schedule(starts: Tensor, pattern_of: Tensor, together: int = 1) -> Tensor:
    """The order of launch, int32 [..., units * rows]: heavy units first, `together` of them at a
    time so that what they read stays in the cache, and of these the longest lists first, so that
    short ones fill the device while the last long ones end."""
    lengths = starts.diff(dim=1)[pattern_of.long()]
    rank = lengths.sum(-1).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    section = (rank // max(together, 1))[..., None]
    longest = starts.diff(dim=1).max() + 1
    keys = section * longest - lengths  # lower is earlier
    return keys.flatten(-2).argsort(dim=-1, stable=True).int()


def side_by_side(keys: int, width: int, itemsize: int) -> int:
    """How many key/value heads of `keys` tokens and `width` channels (of k and v together) a cache
    holds at once, at least one."""
    return max(1, _IN_CACHE // (keys * width * itemsize))


def _sizes(tokens: int, block: int, device: Any) -> Tensor:
    start = torch.arange(0, tokens, block, device=device)
    return torch.clamp(tokens - start, max=block)
