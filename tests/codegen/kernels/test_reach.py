"""Which tiles are read, and which of them whole, against the mask written out."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.pieces.reach import key_tiles, query_tiles
from attnopt.compiler.spec import CAUSAL, FULL, Mask

BLOCK = 16
MASKS = (
    FULL,
    CAUSAL,
    Mask("window", left=1),
    Mask("window", left=17),
    Mask("window", left=9, sink=3),
    Mask("window", left=5, sink=40),
    Mask("window", left=9, causal=False),
    Mask("window", left=6, sink=3, causal=False),
    Mask("window", left=5, sink=40, causal=False),
)


@triton.jit
def _of_queries(
    found, queries, keys, first_offset, left, sink,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offset = first_offset + tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    first, inner, whole, last = query_tiles(
        start, tl.minimum(start + BLOCK, keys) - 1, queries, offset, left, sink,
        CAUSAL, WINDOW, SINK, BLOCK,
    )  # fmt: skip
    at = found + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 5
    tl.store(at, 0)
    tl.store(at + 1, first)
    tl.store(at + 2, inner)
    tl.store(at + 3, whole)
    tl.store(at + 4, last)


@triton.jit
def _of_keys(
    found, queries, keys, first_offset, left, sink,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offset = first_offset + tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    sinking, first, inner, whole, last = key_tiles(
        offset + start, offset + tl.minimum(start + BLOCK, queries) - 1, keys, left, sink,
        CAUSAL, WINDOW, SINK, BLOCK,
    )  # fmt: skip
    at = found + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 5
    tl.store(at, sinking)
    tl.store(at + 1, first)
    tl.store(at + 2, inner)
    tl.store(at + 3, whole)
    tl.store(at + 4, last)


def _shares(mask: Mask, queries: int, keys: int, offset: int, held: int) -> tuple[Tensor, Tensor]:
    """Of each tile, queries by keys: whether some pair is read, and whether all are. What lies
    beyond the end of the axis `held` does not matter; beyond the other's, nothing is read."""
    read = mask.keep(torch.arange(queries)[:, None] + offset, torch.arange(keys))
    sizes = [-(-queries // BLOCK), -(-keys // BLOCK)]
    tiles = torch.zeros(2, sizes[0] * BLOCK, sizes[1] * BLOCK, dtype=torch.bool)
    tiles[1, queries if held == 0 else 0 :, keys if held == 1 else 0 :] = True
    tiles[:, :queries, :keys] = read.expand(queries, keys)
    tiles = tiles.unflatten(1, (sizes[0], BLOCK)).unflatten(3, (sizes[1], BLOCK))
    return tiles[0].any(3).any(1), tiles[1].all(3).all(1)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("of_queries", [False, True])
def test_tiles_that_are_read(mask: Mask, of_queries: bool) -> None:
    """Nothing that is read is left out, nothing is called whole that is not, and no tile is taken
    in vain but between sinks and window, and where the window begins behind the last key."""
    queries, keys, offsets = 35, 50, range(-20, 60)
    count = -(-(keys if of_queries else queries) // BLOCK)
    found = torch.zeros(len(offsets), count, 5, dtype=torch.int32)
    causal = mask.kind == "causal" or (mask.kind == "window" and mask.causal)
    run = _of_queries if of_queries else _of_keys
    run[(len(offsets), count)](
        found, queries, keys, offsets.start, mask.left, mask.sink, CAUSAL=causal,
        WINDOW=mask.kind == "window", SINK=mask.sink > 0, BLOCK=BLOCK,
    )  # fmt: skip
    for offset, each in zip(offsets, found.tolist(), strict=True):
        some, every = _shares(mask, queries, keys, offset, int(of_queries))
        if of_queries:
            some, every = some.T, every.T
        for tile, (sinking, first, inner, whole, last) in enumerate(each):
            assert 0 <= sinking <= first <= inner <= whole <= last or first == last
            taken = [*range(sinking), *range(first, last)]
            read = some[tile].nonzero().flatten().tolist()
            assert set(read) <= set(taken), (offset, tile)
            assert every[tile, inner:whole].all(), (offset, tile)
            behind = not of_queries and offset + tile * BLOCK - mask.left + 1 >= keys
            if mask.sink <= BLOCK and read and not behind:
                assert taken == read, (offset, tile, each)
