"""Memory on a CPU in large pages, for what steps of decoding read from end to end."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_LARGE = 1 << 21  # bytes of a large page on x86-64, and on Arm with pages of 4 KB
_CHUNK = 1 << 26  # that are mapped at once: what is not written to takes no memory
_LEAST = 1 << 17  # of a tensor that lies in them
_LINE = 256  # where a tensor begins


class Pages:
    """Tensors that lie one behind the other, in pages of 2 MB where Linux gives them (transparent
    huge pages), else in ordinary ones. With pages of 4 KB a processor spends up to a third of the
    time in which it reads weights and caches on where the next page is; under a hypervisor more.

    Memory is let go with the last tensor in it.
    """

    def __init__(self) -> None:
        self._left = memoryview(b"")

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        if size < _LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(shape, dtype=dtype)
        if size > len(self._left):
            self._left = _mapped(max(size, _CHUNK))
        made = torch.frombuffer(self._left[:size], dtype=dtype).view(shape)
        self._left = self._left[-(-size // _LINE) * _LINE :]
        return made

    def copied(self, x: Tensor) -> Tensor:
        """A contiguous copy of a tensor on the CPU."""
        return self.zeros(x.shape, x.dtype).copy_(x)


def _mapped(size: int) -> memoryview:
    """So many bytes of zeros, that begin with a large page."""
    size = -(-size // _LARGE) * _LARGE
    memory = mmap.mmap(-1, size + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _LARGE
    return memoryview(memory)[begin : begin + size]
