"""Into how many parts a long sequence is split, so that a few sequences fill a device."""

from __future__ import annotations

from functools import lru_cache

from attnopt.codegen.pieces.sizes import ceil_div


@lru_cache(maxsize=4096)  # a decoder asks the same at every step
def split_count(programs: int, room: int, tiles: int, overhead: int = 2) -> int:
    """The number of parts, 1 to `tiles`, that ends first: `programs` programs that share nothing go
    through `tiles` tiles of keys each, and the device runs `room` of them at a time. The start of a
    program and the merging of its result cost as much as `overhead` tiles."""
    programs = max(programs, 1)  # of an empty batch too
    best, least = 1, ceil_div(programs, room) * tiles
    for waves in (1, 2, 3, 4, 6, 8):
        splits = min(waves * room // programs, tiles)
        if splits > 1:
            time = ceil_div(programs * splits, room) * (ceil_div(tiles, splits) + overhead)
            if time < least:
                best, least = splits, time
            if splits == tiles:
                break
    return best
