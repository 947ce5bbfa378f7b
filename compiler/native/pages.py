"""Memory on a CPU in large pages, for what steps of decoding read from end to end: `Pages` for what
stays, `Room` for what comes and goes."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]
_LARGE = 1 << 21  # bytes of a large page on x86-64, and on Arm with pages of 4 KB
_CHUNK = 1 << 26  # that are mapped at once: what is not written to takes no memory
_LEAST = 1 << 17  # of a tensor that lies in them
_APART = 256  # what tensors begin at a multiple of: lines of caches are fetched in pairs, of 128


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
                mapped = _mapped(max(size, _CHUNK))
                if mapped is None:
                    return None
                self._left = mapped
            room, self._left = self._left[:size], self._left[-(-size // _APART) * _APART :]
            return room

    def copied(self, x: Tensor) -> Tensor:
        """A contiguous copy of a tensor on the CPU."""
        return self.zeros(x.shape, x.dtype).copy_(x)


class Room:
    """Memory that is used again: once the last tensor of a call is let go, a later call takes it.

    Memory that is new has to be found by the system page by page, and under a hypervisor by the
    host too, which may take as long as a prompt. The largest piece that nobody uses is kept, and
    left to the system should it need it (MADV_FREE). Threads may share an object.
    """

    def __init__(self) -> None:
        self._spare = list[memoryview]()

    def tensors(self, wanted: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
        """Tensors on the CPU of these shapes and dtypes, of zeros or of what somebody left there.
        They are in one piece of memory in large pages, where the system gives them and they would
        fill one; what is not written to takes none of it."""
        begins, size = list[int](), 0
        for shape, dtype in wanted:
            begins.append(size)
            size += -(-math.prod(shape) * dtype.itemsize // _APART) * _APART
        taken = self._taken(size) if size >= _LARGE else None
        if taken is None:
            return [torch.zeros(shape, dtype=dtype, device="cpu") for shape, dtype in wanted]
        made = []
        for begin, (shape, dtype) in zip(begins, wanted, strict=True):
            part = torch.from_numpy(taken[begin : begin + math.prod(shape) * dtype.itemsize])
            made.append(part.view(dtype).view(shape).detach())  # a view of nothing
        return made

    def _taken(self, size: int) -> Bytes | None:
        """Bytes that are nobody else's, until nobody has a part of them."""
        memory = None
        with suppress(IndexError):
            memory = self._spare.pop()
        if memory is None or len(memory) < size:
            memory = _mapped(size)
        if memory is None:
            return None
        made = np.frombuffer(memory, np.uint8, size)
        finalize(made, self._let_go, memory).atexit = False
        return made

    def _let_go(self, memory: memoryview) -> None:
        with suppress(AttributeError, OSError):  # another system
            memory.obj.madvise(mmap.MADV_FREE)  # type: ignore[attr-defined]
        with suppress(IndexError):  # at any time and in any thread: by steps that none can split
            memory = max(memory, self._spare.pop(), key=len)
        self._spare.append(memory)


def _mapped(size: int) -> memoryview | None:
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
