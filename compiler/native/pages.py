"""`Pages`: memory on a CPU in large pages, for what steps of decoding read from end to end and what
stays."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock

import torch
from torch import Tensor

_LARGE = 1 << 21  # bytes of a large page on x86-64, and on Arm with pages of 4 KB
_CHUNK = 1 << 26  # that are mapped at once: what is not written to takes no memory
_LEAST = 1 << 17  # of a tensor that lies in them
APART = 256  # what tensors begin at a multiple of: lines of caches are fetched in pairs, of 128


class Pages:
    """Tensors that lie one behind the other, in pages of 2 MB where Linux gives them (transparent
    huge pages), else in ordinary ones. With pages of 4 KB a processor spends up to a third of the
    time in which it reads weights and caches on where the next page is; under a hypervisor more.

    Memory is let go with the last tensor in it. Threads may share an object.
    """

    def __init__(self) -> None:
        self._left, self._taking = memoryview(b""), Lock()

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        room = self._taken(size) if size >= _LEAST else None
        if room is None:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(room, dtype=dtype).view(shape).detach()  # a view of nothing

    def _taken(self, size: int) -> memoryview | None:
        """Memory that nobody else has; none where the system gives none of this kind."""
        with self._taking:
            if size > len(self._left):
                new = mapped(max(size, _CHUNK))
                if new is None:
                    return None
                self._left = new
            room, self._left = self._left[:size], self._left[-(-size // APART) * APART :]
            return room

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors of one dtype on the CPU, that are alike but for their lengths, one behind the
        other."""
        made = self.zeros((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
        return torch.cat(list(parts), out=made)


def mapped(size: int) -> memoryview | None:
    """At least so many bytes of zeros, and room between tensors, that begin with a large page; none
    where the system gives none of this kind."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    size = -(-size // _LARGE) * _LARGE + 2 * _LARGE
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        return None
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _LARGE
    return memoryview(memory)[begin:]
