"""Sizes that launchers work out on the host."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor


def ceil_div(size: int, step: int) -> int:
    """`size` / `step` rounded up. Launchers take it for `triton.cdiv`, which needs microseconds."""
    return -(-size // step)


@lru_cache
def padded_size(size: int) -> int:
    """The size of the tile that holds `size` channels: a power of two, at least 16, which is what
    matrix instructions take."""
    return max(16, 1 << (size - 1).bit_length())


def with_strides(tensor: Tensor | None, *shape: int) -> tuple[Tensor | int, ...] | None:
    """The tensor and its strides once broadcast to the shape, as kernels take optional tensors."""
    return None if tensor is None else (tensor, *tensor.expand(shape).stride())


def with_rows(tensor: Tensor) -> tuple[Tensor | int, ...]:
    """A tensor `[batch, heads, tokens, channels]` and its strides but the last, which is one."""
    return tensor, *tensor.stride()[:3]


def two_pieces(size: int) -> tuple[int, int]:
    """Tiles of powers of two, at least 16, that hold `size` channels side by side with the least
    padding: (128, 64) for 192, (512, 0) for 512 or 500."""
    large = 1 << (size.bit_length() - 1)
    if large < 16 or large == size or padded_size(size - large) == large:
        return padded_size(size), 0
    return large, padded_size(size - large)
