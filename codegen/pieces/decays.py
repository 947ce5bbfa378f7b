"""How the state of linear attention decays: hooks that give each token's log decay.

A hook is a pair of `@triton.jit` functions. `once(data, batch, head)` is called before the loop
over tokens, and what it gives comes to `each(data, held, batch, head, position, there)` of a tile
of positions: the natural logarithms by which the state shrinks as the tokens come in. It may read
memory only where `there`, and what it gives elsewhere is thrown away. `data` is (pointer, batch,
head and token stride). To add a hook, write both and name them in `decay_hook`.

Weights are only ever taken from differences of cumulative logarithms. Where decays are at most one
these are at most zero, so that nothing overflows and nothing is divided by a number near zero.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from attnopt.codegen.pieces.online_softmax import LOG2E


@triton.jit
def head_once(data, b, h):
    """One decay for all tokens of a head (retention, lightning attention)."""
    return tl.load(data[0] + h * data[2])


@triton.jit
def head_each(data, held, b, h, position, there):
    return tl.full(position.shape, 0.0, tl.float32) + held


@triton.jit
def token_once(data, b, h):
    """A decay for each token (the scalar gates of Mamba-2 and of simple GLA)."""
    return 0.0


@triton.jit
def token_each(data, held, b, h, position, there):
    at = data[0] + b * data[1] + h * data[2] + position.to(tl.int64) * data[3]
    return tl.load(at, mask=there, other=0.0)


def decay_hook(name: str) -> tuple[Any, Any]:
    """The hook of a name; (None, None) for "none"."""
    if name == "head":
        return head_once, head_each
    if name == "token":
        return token_once, token_each
    return None, None


@triton.jit
def cumulative(data, held, b, h, position, length, EACH: tl.constexpr, MASKED: tl.constexpr):
    """The cumulative log decays of a chunk in base 2, its own token's included, and their total;
    zeros without a hook. Tokens at or past `length` do not decay."""
    if EACH is None:
        logs = tl.full(position.shape, 0.0, tl.float32)
        return logs, 0.0
    else:
        there = position < length
        steps = EACH(data, held, b, h, position, there) * LOG2E
        if MASKED:
            steps = tl.where(there, steps, 0.0)
        return tl.cumsum(steps, 0), tl.sum(steps, 0)
