"""`derive`: a decoder with a cache, made of a graph."""

from __future__ import annotations

from attnopt.compiler.decode.causal import require_causal
from attnopt.compiler.decode.decoder import Decoder
from attnopt.compiler.decode.equal import require_equal
from attnopt.compiler.decode.split import merged, split
from attnopt.compiler.program import Program


def derive(program: Program, slack: int = 0, check: bool = True) -> Decoder:
    """A decoder with a cache, of a raised program that maps tokens `[batch, seq]` to logits.

    Caches of windows and of convolutions can take back `slack` tokens. With `check`, every operator
    is shown to let no token change an earlier position, and the decoder is compared with the
    program. Raises `Problem` A701 to A706.
    """
    program = merged(program)
    parts = split(program)
    if check:
        require_causal(program, parts)
    made = Decoder(program, parts, slack)
    if check:
        require_equal(made)
    return made
