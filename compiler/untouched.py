"""A module left as it was, however its forward pass caches: what it stores while it is traced are
fake tensors, which would break its next call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_TABLES = ("_buffers", "_parameters", "_modules")


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Undo, at the end of the block, every attribute that the block set or deleted on a submodule.

    Tensors that were written to in place are not restored.
    """
    before = [(part, _state(part)) for part in module.modules()]
    try:
        yield
    finally:
        for part, (own, tables) in before:
            part.__dict__.clear()
            part.__dict__.update(own)
            for table, entries in zip(_TABLES, tables, strict=True):
                own[table].clear()
                own[table].update(entries)


def _state(part: nn.Module) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return dict(part.__dict__), [dict(part.__dict__[table]) for table in _TABLES]
