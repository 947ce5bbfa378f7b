"""How much of a target's shared memory a pipelined loop takes, roughly: what default tiles go by.

What a compiled kernel really takes is read from it (`aot`); this is the guess before.
"""

from __future__ import annotations

from attnopt.codegen.target import Target

_RESERVED = 4096  # for the reductions and layout changes that the compiler adds


def stages_that_fit(target: Target, kept: int, streamed: int, most: int) -> int:
    """The number of pipeline stages, 0 to `most`, for which `kept` bytes and `streamed` bytes per
    stage fit into the shared memory of one block."""
    room = target.shared_per_block - _RESERVED - kept
    return max(0, min(most, room // max(streamed, 1)))


def loop_stages(target: Target, kept: int, streamed: int) -> int:
    """Stages of a loop in which tiles of `kept` bytes meet others of `streamed` bytes in matrix
    products; 0 where they do not fit into shared memory."""
    if target.vendor == "amd":  # what is kept stays in registers there, and one stage takes fewest
        return stages_that_fit(target, 0, streamed, 1)
    if target.capability in ("9.0", "10.0"):  # whose matrix instructions read shared memory
        return stages_that_fit(target, kept, streamed, 3)
    buffers = stages_that_fit(target, kept, streamed, 2 if target.shared_per_block > 2**17 else 1)
    return buffers + 1 if buffers else 0  # of which one is in registers
