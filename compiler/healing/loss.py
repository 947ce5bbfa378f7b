"""How far the healed program's outputs are from the original's: the loss that is trained and the
one that held-out batches are judged by, one formula.

Where the outputs hold "logits": KL(original || healed) in nats per real token, the distillation
loss of Hinton et al. 2015 at temperature 1. Else the squared distance of all floating outputs over
the original's squared norm, at real tokens. The definitions are those of `attnopt.compiler.damage`,
with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.compiler.damage import divergence, logits, real_entries, squared_error
from attnopt.compiler.program import Batch

Model = Callable[[Batch], Any]


def unit(outputs: Any) -> str:
    """What the loss of these outputs is counted in."""
    return "nats/token" if logits(outputs) is not None else "relative squared error"


def distance(expected: Any, actual: Any, batch: Batch) -> Tensor:
    """The loss of one batch, a scalar with gradients towards `actual`."""
    teacher, student = logits(expected), logits(actual)
    if teacher is None or student is None:
        return _squares(expected, actual, batch)
    wide = teacher.shape[-1]
    theirs, mine = (
        torch.log_softmax(real_entries(value, batch).float().reshape(-1, wide), -1)
        for value in (teacher, student)
    )
    return F.kl_div(mine, theirs, reduction="sum", log_target=True) / max(1, len(mine))


def _squares(expected: Any, actual: Any, batch: Batch) -> Tensor:
    wrong: Any = 0.0
    norm = 0.0
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True)
    for a, b in pairs:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        a, b = real_entries(a, batch).float(), real_entries(b, batch).float()
        wrong = wrong + (a - b).square().sum()
        norm += float(a.square().sum())
    made: Tensor = torch.as_tensor(wrong) / max(norm, 1e-30)
    return made


class Heldout:
    """The loss over held-out batches, streaming. What the original gives is kept while it is small,
    since it is asked for at every check."""

    def __init__(self, original: Model, batches: Sequence[Batch], room: int = 1 << 28) -> None:
        self.original, self.batches, self.room = original, batches, room
        self._kept: dict[int, Any] = {}

    def __call__(self, healed: Model) -> float:
        """The loss of a model, in `unit`."""
        above = below = 0.0
        for index, batch in enumerate(self.batches):
            expected = self._expected(index)
            with torch.no_grad():
                actual = healed(batch)
            measure = squared_error if logits(expected) is None else divergence
            a, b = measure(expected, actual, batch)
            above, below = above + a, below + b
        return above / max(below, 1e-300)

    def _expected(self, index: int) -> Any:
        if index in self._kept:
            return self._kept[index]
        with torch.no_grad():
            made = self.original(self.batches[index])
        size = sum(t.nbytes for t in pytree.tree_leaves(made) if isinstance(t, Tensor))
        if size <= self.room:
            self.room -= size
            self._kept[index] = made
        return made
