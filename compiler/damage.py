"""How far a changed program's outputs are from the original's, as one number to compare choices by.

Where the outputs hold "logits": KL(original || changed) in nats per row (a row is a real token, or
a sample). Else |changed - original| / |original| over all floating outputs at real tokens. Zero is
the same function. This ranks choices inside a pass; what a plan cost is measured by `autotune`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.compiler.program import Batch, Program

Metric = Callable[[Any, Any, Batch], tuple[float, float]]


class Damage:
    """Adds up a metric over batches against the original's outputs, which are computed once.

    `metric(expected, actual, batch)` gives a sum and the count or norm that it is divided by; a
    NaN or missing output makes the damage infinite.
    """

    def __init__(
        self, original: Program, batches: Sequence[Batch], metric: Metric | None = None
    ) -> None:
        self.batches = list(batches)
        self.expected = [original.run(batch) for batch in self.batches]
        self.is_kl = metric is None and all(logits(out) is not None for out in self.expected)
        self._metric = metric or (divergence if self.is_kl else squared_error)
        self.unit = "KL in nats" if self.is_kl else "relative output error"

    def __call__(self, program: Program) -> float:
        """The damage of a program over all batches."""
        return self.of([program.run(batch) for batch in self.batches])

    def of(self, outputs: Sequence[Any]) -> float:
        """The damage of given outputs, one per batch."""
        sums = [self.sums(index, out) for index, out in enumerate(outputs)]
        return self.total(sums)

    def sums(self, index: int, out: Any) -> tuple[float, float]:
        """The two sums of one batch."""
        return self._metric(self.expected[index], out, self.batches[index])

    def total(self, sums: Sequence[tuple[float, float]]) -> float:
        """The damage from the sums of all batches."""
        value = sum(a for a, _ in sums) / max(sum(b for _, b in sums), 1e-300)
        if not math.isfinite(value):
            return math.inf
        return math.sqrt(value) if self._metric is squared_error else value


def logits(out: Any) -> Tensor | None:
    """The logits `[..., classes]` among a model's outputs, if it has any."""
    found = out.get("logits") if isinstance(out, Mapping) else None
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


def divergence(expected: Any, actual: Any, batch: Batch) -> tuple[float, float]:
    """Sum over rows of KL(expected || actual) in nats, and the number of rows."""
    teacher, student = logits(expected), logits(actual)
    if teacher is None or student is None or teacher.shape != student.shape:
        return math.inf, 1.0
    teacher, student = real_entries(teacher, batch), real_entries(student, batch)
    log_p = torch.log_softmax(teacher.float().reshape(-1, teacher.shape[-1]), -1)
    log_q = torch.log_softmax(student.float().reshape(-1, student.shape[-1]), -1)
    return float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64)), float(len(log_p))


def squared_error(expected: Any, actual: Any, batch: Batch) -> tuple[float, float]:
    """Sum of squared differences over all floating outputs, and the sum of the expected squares."""
    wrong = norm = 0.0
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True)
    for a, b in pairs:
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue
        a, b = real_entries(a, batch).double(), real_entries(b, batch).double()
        wrong += float((a - b).square().sum())
        norm += float(a.square().sum())
    return wrong, norm


def real_entries(value: Tensor, batch: Batch) -> Tensor:
    """The entries at real tokens of an output `[batch, seq, ...]`; all of any other."""
    valid = batch.valid
    if valid is None or value.dim() < 3 or value.shape[:2] != valid.shape:
        return value
    return value[valid.to(value.device)]
