"""Where in the source a node was made: the calls that led to it, read back from its trace.

`torch.export` notes with every node the `forward` methods that were running; the functions that
these call, where attention is often written, are noted too under `every_call`.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import TracerBase

_TORCH = str(Path(torch.__file__).parent)
_CALL = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)(?:, in (?P<function>\S+))?')
_FILTER = "_filter_traceback_frames"  # torch's hook; a torch without it notes what it always did


@dataclass(frozen=True)
class Frame:
    """One call: the line that ran in `file`, and the text of that line when it ran."""

    file: str
    line: int
    function: str = ""
    text: str = ""

    @property
    def in_torch(self) -> bool:
        """Whether torch's own code ran here."""
        return self.file.startswith(_TORCH) or "/torch/nn/" in self.file

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def frames(node: fx.Node) -> tuple[Frame, ...]:
    """The calls that led to a node, the innermost last; empty where none was noted."""
    found: list[Frame] = []
    for told in str(node.meta.get("stack_trace") or "").splitlines():
        call = _CALL.search(told)
        if call is not None:
            found.append(Frame(call["file"], int(call["line"]), call["function"] or ""))
        elif found and not found[-1].text and told.strip():
            last = found[-1]
            found[-1] = Frame(last.file, last.line, last.function, told.strip())
    return tuple(found)


def own(node: fx.Node) -> Frame | None:
    """The innermost call outside of torch; inside of it, where torch alone was running."""
    found = frames(node)
    users = [frame for frame in found if not frame.in_torch]
    outermost_first = users or list(found)
    return outermost_first[-1] if outermost_first else None


@contextmanager
def every_call() -> Iterator[None]:
    """Let a trace note every call outside of torch from the first `forward` on."""
    hook: Any = getattr(TracerBase, _FILTER, None)
    if hook is None:
        yield
        return
    setattr(TracerBase, _FILTER, _noted)
    try:
        yield
    finally:
        setattr(TracerBase, _FILTER, hook)


def _noted(tracer: TracerBase, calls: Sequence[traceback.FrameSummary]) -> traceback.StackSummary:
    """The running calls that are noted: the `forward`s of modules, and what they call outside of
    torch."""
    kept = list[traceback.FrameSummary]()
    for call in calls:
        outside = not call.filename.startswith(_TORCH)
        module = call.name == "forward" and (outside or call.filename.startswith(f"{_TORCH}/nn/"))
        if module or (outside and kept):
            kept.append(call)
    return traceback.StackSummary.from_list(kept)
