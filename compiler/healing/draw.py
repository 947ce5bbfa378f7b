"""What a healing trains on: batches drawn by seed from the training data, the same at every step of
every run.

Sequences of a token stream are cut at random places, so that a short text gives many; of other data
whole batches are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.compiler.program import Batch

_IDS, _MASK = "input_ids", "attention_mask"


@dataclass(frozen=True)
class Draw:
    """A source of batches. `stream` int64 `[tokens]` is the text where there is one, else None."""

    batches: Sequence[Batch]
    seed: int
    stream: Tensor | None = None

    @staticmethod
    def of(batches: Sequence[Batch], seed: int) -> Draw:
        """Draws from batches: as a stream where all are unpadded token ids of one shape."""
        shapes = {tuple(b.kwargs[_IDS].shape) for b in batches if _is_text(b)}
        whole = len(shapes) == 1 and all(_is_text(b) for b in batches)
        stream = torch.cat([b.kwargs[_IDS].reshape(-1) for b in batches]) if whole else None
        return Draw(batches, seed, stream)

    def __call__(self, step: int, stage: int = 0) -> Batch:
        """The batch of one step of one stage; the same whenever it is asked for."""
        draw = torch.Generator().manual_seed(
            (self.seed * 1_000_003 + stage) * 1_000_003 % 2**62 + step
        )
        at = int(torch.randint(0, len(self.batches), (1,), generator=draw))
        batch = self.batches[at]
        if self.stream is None:
            return batch
        rows, length = batch.kwargs[_IDS].shape
        starts = torch.randint(0, len(self.stream) - length + 1, (rows,), generator=draw)
        ids = torch.stack([self.stream[start : start + length] for start in starts.tolist()])
        return replace(batch, kwargs={**batch.kwargs, _IDS: ids})


def tokens(batch: Batch) -> int:
    """How many real tokens a batch holds; samples, where its inputs have no sequence."""
    if batch.valid is not None:
        return int(batch.valid.sum())
    tensors = [x for x in (*batch.args, *batch.kwargs.values()) if isinstance(x, Tensor)]
    first = next(iter(tensors), torch.zeros(1))
    sequence = first.dim() == 3 or (first.dim() == 2 and not first.is_floating_point())
    return first.shape[0] * first.shape[1] if sequence else first.shape[0] if first.dim() else 1


def _is_text(batch: Batch) -> bool:
    """Whether a batch is token ids `[rows, length]` without padding, and nothing else."""
    ids, mask = batch.kwargs.get(_IDS), batch.kwargs.get(_MASK)
    if batch.args or not isinstance(ids, Tensor) or ids.dim() != 2:
        return False
    if set(batch.kwargs) - {_IDS, _MASK} or (batch.valid is not None and not batch.valid.all()):
        return False
    return mask is None or bool(torch.as_tensor(mask).all())
