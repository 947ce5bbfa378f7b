"""`Memory`: what caches and prompts of a decoder take on a CPU, kept for later ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnopt.compiler.native.build import loaded
from attnopt.compiler.native.pages import APART, mapped

_LEAST = 1 << 22  # bytes of tensors that lie in one piece of it, as in memory.cpp


class Memory:
    """Memory that is used again: what large tensors of one call let go, those of later ones take.

    Memory that is new has to be found by the system page by page, and under a hypervisor by the
    host too, which may take as long as a prompt. It is kept in C++ (`memory.cpp`): where the
    operators are not loaded, none is. What lies idle is left to the system should it need it
    (MADV_FREE), and given back with the last such object. Threads may share one.
    """

    def __init__(self) -> None:
        self._held = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While large tensors that are made on the CPU, by this thread, lie in it; they may be used
        for longer."""
        if not loaded():
            yield
            return
        if not self._held:
            self._held = True
            torch.ops.attnopt.hold_memory(True)
            finalize(self, torch.ops.attnopt.hold_memory, False).atexit = False
        torch.ops.attnopt.keep_memory(True)
        try:
            yield
        finally:
            torch.ops.attnopt.keep_memory(False)

    def tensors(self, wanted: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
        """Tensors on the CPU of these shapes and dtypes, of zeros or of what somebody left there;
        where they are large together, they are one piece, and what is not written to takes no
        memory. For torch they share nothing, of which compiled code would take care."""
        begins, size = list[int](), 0
        for shape, dtype in wanted:
            begins.append(size)
            size += -(-math.prod(shape) * dtype.itemsize // APART) * APART
        piece = self._piece(size) if size >= _LEAST else None
        if piece is None:
            return [torch.zeros(shape, dtype=dtype, device="cpu") for shape, dtype in wanted]
        made = []
        for begin, (shape, dtype) in zip(begins, wanted, strict=True):
            part = torch.from_numpy(piece[begin : begin + math.prod(shape) * dtype.itemsize])
            made.append(part.view(dtype).view(shape).detach())  # a view of nothing
        return made

    def _piece(self, size: int) -> NDArray[np.uint8] | None:
        """So many bytes, or none where the system gives none in large pages; new ones where the
        operators are not loaded."""
        if loaded():
            with self.kept():
                return torch.empty(size, dtype=torch.uint8, device="cpu").numpy()
        new = mapped(size)
        return None if new is None else np.frombuffer(new, np.uint8, size)
