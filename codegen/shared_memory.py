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
