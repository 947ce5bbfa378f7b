"""Where a healing stands, on disk: an interrupted one goes on from there and ends as if it had not
been interrupted, since what is drawn depends on the seed and the step alone."""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.compiler.program import Batch, Program

SECONDS = 30.0
log = logging.getLogger("attnopt")


@dataclass
class Checkpoint:
    """A file that is written at most every `seconds`; without a path nothing is kept.

    A file whose key is another (other settings, programs or data), or that cannot be read, counts
    as none.
    """

    path: Path | None = None
    key: str = ""
    seconds: float = SECONDS
    written: float = field(default_factory=time.monotonic)

    def load(self) -> dict[str, Any] | None:
        """What was saved last under this key."""
        if self.path is None or not is_zipfile(self.path):  # torch.save writes one
            return None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
            return None
        return found if isinstance(found, dict) and found.get("key") == self.key else None

    def due(self) -> bool:
        """Whether it is time to save."""
        return self.path is not None and time.monotonic() - self.written >= self.seconds

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file in one step. Where the disk refuses, the earlier one stays: the healing
        goes on, and an interruption costs more."""
        if self.path is None:
            return
        fresh = self.path.with_name(self.path.name + ".new")
        try:
            torch.save({**state, "key": self.key}, fresh)
            os.replace(fresh, self.path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter
            log.warning("where the healing stands was not saved: %s", error)
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
        self.written = time.monotonic()

    def clear(self) -> None:
        """Forget what was saved."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def key_of(told: object, program: Program, original: Program, batches: Iterable[Batch]) -> str:
    """A hash of all that a healing depends on: what it is told, both graphs, which hold the specs
    of the attentions, all weights, and the data."""
    made = sha256(repr(told).encode())
    known = dict[int, str]()  # the programs share most of their weights
    for graph in (program, original):
        made.update(str(graph.graph).encode())
        for name, value in graph.module.state_dict(keep_vars=True).items():
            if id(value) not in known:
                alone = sha256()
                _add(alone, value)
                known[id(value)] = alone.hexdigest()
            made.update(f"{name} {known[id(value)]}".encode())
    for batch in batches:
        for leaf in pytree.tree_leaves((batch.args, dict(batch.kwargs), batch.valid)):
            if isinstance(leaf, Tensor):
                _add(made, leaf)
    return made.hexdigest()


def _add(made: Any, value: Tensor) -> None:
    made.update(f"{value.dtype} {tuple(value.shape)}".encode())
    made.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
