"""What a launcher launches, without launching it: its kernels, grids and arguments.

Called on tensors of the device "meta", a launcher allocates nothing; while `recording`, each
`kernel[grid](...)` is noted instead of run. What is compiled ahead of time is so exactly what the
launcher would have asked for, with no second description of its arguments to keep in step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

from triton.runtime.jit import JITFunction

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "waves_per_eu", "matrix_instr_nonkdim")


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, its arguments by name and its compiler options."""

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it, kernels of triton are noted in the list and not run.

    Works on `triton.jit` functions, hence not in a process that runs triton's interpreter.
    """
    noted: list[Launch] = []
    run, here = JITFunction.run, get_ident()

    def note(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        if get_ident() != here:  # another thread's launch is none of ours
            return run(self, *args, grid=grid, warmup=warmup, **kwargs)
        options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        defaults = {p.name: p.default for p in self.params if p.has_default}
        arguments = {**defaults, **arguments}
        size = grid(arguments) if callable(grid) else tuple(grid)
        noted.append(Launch(self, size, arguments, options))
        return None

    JITFunction.run = note
    try:
        yield noted
    finally:
        JITFunction.run = run
