"""Into how many parts a long sequence is split, so that a few sequences fill a device."""

from __future__ import annotations

import triton

_WAVES = (1, 2, 3, 4, 6, 8)


def split_count(programs: int, room: int, tiles: int, overhead: int = 2) -> int:
    """The number of parts, 1 to `tiles`, that ends first: `programs` programs that share nothing go
    through `tiles` tiles of keys each, and the device runs `room` of them at a time. The start of a
    program and the merging of its result cost as much as `overhead` tiles."""
    best, least = 1, triton.cdiv(programs, room) * tiles
    for waves in _WAVES:
        splits = min(waves * room // programs, tiles)
        if splits > 1:
            time = triton.cdiv(programs * splits, room) * (triton.cdiv(tiles, splits) + overhead)
            if time < least:
                best, least = splits, time
    return best
