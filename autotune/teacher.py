"""The original as a teacher: what candidates are compared with, computed once and kept.

For a language model the next-token log-probabilities are kept in float16 while they fit; what does
not fit is computed again. They are normalised after reading, which leaves of the rounding only its
second order, about 1e-6 nats of KL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from attnopt.autotune import outputs as out
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Batch

Model = Callable[..., Any]

LANGUAGE = "causal-lm"
_CELLS = 1 << 24  # logits that are held in float32 at once
_CACHE_BYTES = 2 << 30
# What arithmetic alone may change: relative perplexity, and the relative distance of outputs.
_LOSS_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-4}
_OUTPUT_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2}
_COARSEST = {True: 2e-3, False: 5e-2}  # bfloat16 and narrower: (language, outputs)


@dataclass(frozen=True)
class Scores:
    """Sums per sequence of one candidate: `tokens` `[n]` and named columns `[n]`, float64.

    A `reason` means that the candidate cannot be scored (NaN, other shapes).
    """

    tokens: NDArray[np.float64]
    columns: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    rounding: float = 0.0
    reason: str = ""

    def as_tuples(self) -> dict[str, tuple[float, ...]]:
        """The columns as plain numbers, for reports."""
        kept = {"tokens": self.tokens, **self.columns}
        return {name: tuple(column.tolist()) for name, column in kept.items()}


@dataclass(frozen=True)
class _Kept:
    """The original on one batch: at scored rows NLL, best token, log-probabilities; or outputs."""

    nll: Tensor
    top: Tensor
    log_probs: Tensor | None = None
    outputs: tuple[Tensor, ...] = ()


class Teacher:
    """The original model on held-out batches. `score` compares a candidate; the original runs once.

    `cache_bytes` bounds what is kept (2 GiB, and never more than a quarter of the free memory).
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[Batch],
        task: str = LANGUAGE,
        cache_bytes: int | None = None,
    ) -> None:
        self.model, self.batches, self.language = model, tuple(batches), task == LANGUAGE
        self._room = _room() if cache_bytes is None else cache_bytes
        self._kept: dict[int, _Kept] = {}
        self._metrics: dict[str, float] = {}
        self.forwards = 0

    def score(
        self, candidate: Model, progress: Callable[[str, float], None] | None = None
    ) -> Scores:
        """Run the candidate over all batches, streaming, and compare it with the original."""
        if not self.batches:
            raise Problem("A406", "there is no held-out data to measure accuracy on",
                          help="give text or inputs with --text FILE or --inputs FILE")  # fmt: skip
        parts: list[dict[str, Tensor]] = []
        rounding = 0.0
        for index, batch in enumerate(self.batches):
            kept = self._original(index)
            made = out.call(candidate, batch)
            rounding = max(rounding, self._rounding(made))
            compare = self._compare_logits if self.language else self._compare_outputs
            part = compare(kept, made, batch)
            if isinstance(part, str):
                return Scores(np.zeros(0), reason=f"batch {index}: {part}")
            parts.append(part)
            if progress is not None:
                progress("measuring accuracy", (index + 1) / len(self.batches))
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        counted = joined["tokens"] > 0
        columns = {name: column[counted].double().numpy() for name, column in joined.items()}
        if not len(columns["tokens"]):
            raise Problem("A406", "the held-out data has no token to predict",
                          help="give sequences of at least two real tokens")  # fmt: skip
        return Scores(columns.pop("tokens"), columns, rounding)

    def metric(self, name: str, function: Callable[[Model], float]) -> float:
        """A user's metric of the original, computed once."""
        if name not in self._metrics:
            self._metrics[name] = float(function(self.model))
        return self._metrics[name]

    def _original(self, index: int) -> _Kept:
        if index in self._kept:
            return self._kept[index]
        batch = self.batches[index]
        made = out.call(self.model, batch)
        self.forwards += 1
        kept = self._of_logits(made, batch) if self.language else self._of_outputs(made)
        valid = out.valid_of(batch)
        if not all(bool(out.real(t, valid).isfinite().all()) for t in (kept.nll, *kept.outputs)):
            what = f"the model as given gives NaN or infinity on batch {index}"
            help = "look at its weights and inputs: nothing can be compared"
            raise Problem("A402", what, help=help)
        size = _bytes(kept)
        if size <= self._room:
            self._room -= size
            self._kept[index] = kept
        return kept

    def _of_logits(self, made: Any, batch: Batch) -> _Kept:
        scores, targets, _ = _rows(out.logits(made), batch)
        nll, top, log_probs = [], [], []
        for start, stop in _chunks(scores):
            exact = F.log_softmax(scores[start:stop].float(), -1)
            nll.append(-exact.gather(-1, targets[start:stop, None])[:, 0].cpu())
            top.append(exact.argmax(-1).cpu())
            log_probs.append(exact.half().cpu())
        return _Kept(torch.cat(nll), torch.cat(top), torch.cat(log_probs))

    def _of_outputs(self, made: Any) -> _Kept:
        empty = torch.zeros(0)
        return _Kept(empty, empty, None, tuple(t.detach().cpu() for t in out.floats(made)))

    def _compare_logits(self, kept: _Kept, made: Any, batch: Batch) -> dict[str, Tensor] | str:
        logits, tokens = out.logits(made), _tokens(batch)
        assert kept.log_probs is not None
        if tuple(logits.shape) != (*tokens.shape, kept.log_probs.shape[-1]):
            return "its logits have another shape than the original's"
        scores, targets, sequence = _rows(logits, batch)
        sums = {name: torch.zeros(len(tokens), dtype=torch.float64) for name in _COLUMNS}
        for start, stop in _chunks(scores):
            mine = F.log_softmax(scores[start:stop].float(), -1)
            theirs = F.log_softmax(kept.log_probs[start:stop].to(mine), -1)
            target, owner = targets[start:stop], sequence[start:stop]
            gap = torch.where(theirs > float("-inf"), theirs.exp() * (theirs - mine), 0.0)
            found = {
                "tokens": torch.ones(len(mine)),
                "nll_original": kept.nll[start:stop],
                "nll": -mine.gather(-1, target[:, None])[:, 0],
                "kl": gap.sum(-1).clamp_min(0.0),
                "agree": (mine.argmax(-1).cpu() == kept.top[start:stop]).float(),
            }
            if not bool(found["nll"].isfinite().all() and found["kl"].isfinite().all()):
                return "its outputs are not finite (NaN or infinity)"
            for name, values in found.items():
                sums[name].index_add_(0, owner, values.double().cpu())
        return sums

    def _compare_outputs(self, kept: _Kept, made: Any, batch: Batch) -> dict[str, Tensor] | str:
        mine = [tensor.cpu() for tensor in out.floats(made)]
        if [tuple(t.shape) for t in mine] != [tuple(t.shape) for t in kept.outputs] or not mine:
            return "its outputs have other shapes than the original's"
        valid = out.valid_of(batch)
        if not all(bool(out.real(tensor, valid).isfinite().all()) for tensor in mine):
            return "its outputs are not finite (NaN or infinity)"
        each = [_cosine(a, b, valid) for a, b in zip(mine, kept.outputs, strict=True)]
        samples = max(len(one) for one in each)
        worst = torch.stack([one.expand(samples) for one in each]).amin(0)
        return {"tokens": _samples(valid, samples), "cosine": worst}

    def _rounding(self, made: Any) -> float:
        """The drop that rounding alone may make, by the coarsest dtype of the outputs."""
        table = _LOSS_ROUNDING if self.language else _OUTPUT_ROUNDING
        found = [table.get(t.dtype, _COARSEST[self.language]) for t in out.floats(made)]
        largest = max(found, default=0.0)
        return largest if self.language else largest**2 / 2  # 1 - cosine of a relative distance


_COLUMNS = ("tokens", "nll_original", "nll", "kl", "agree")


def _tokens(batch: Batch) -> Tensor:
    """The token ids of a batch, int64 `[batch, seq]`. Raises `Problem` A406 when it has none."""
    named = batch.kwargs.get("input_ids")
    if isinstance(named, Tensor):
        return named
    for tensor in out.tensors([*batch.args, *batch.kwargs.values()]):
        if tensor.dtype in (torch.int64, torch.int32) and tensor.dim() == 2:
            return tensor
    raise Problem("A406", "the inputs hold no token ids to predict",
                  help="measure by --metric module:function instead")  # fmt: skip


def _rows(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that predict a real next token: logits `[rows, vocabulary]`, target, sequence `[rows]`.

    Position t predicts token t + 1, and counts where both are real.
    """
    tokens = _tokens(batch).to(logits.device)
    valid = out.valid_of(batch)
    real = torch.ones(tokens.shape, dtype=torch.bool) if valid is None else valid.cpu()
    if logits.shape[:2] != tokens.shape:
        what = f"logits of {tuple(logits.shape)} for tokens of {tuple(tokens.shape)}"
        raise Problem("A406", what,
                      why="a causal model gives one row of logits per token")  # fmt: skip
    counts = real[:, :-1] & real[:, 1:]
    picked = counts.to(logits.device)
    return logits[:, :-1][picked], tokens[:, 1:][picked].long(), counts.nonzero()[:, 0]


def _chunks(rows: Tensor) -> list[tuple[int, int]]:
    step = max(1, _CELLS // max(1, rows.shape[-1]))
    return [(start, min(start + step, len(rows))) for start in range(0, max(1, len(rows)), step)]


def _cosine(a: Tensor, b: Tensor, valid: Tensor | None) -> Tensor:
    """Cosine similarity of each sample `[batch]` over its real positions, float64."""
    if not a.dim():
        a, b = a[None], b[None]
    mine, theirs = a.double(), b.double()
    if valid is not None and tuple(a.shape[:2]) == tuple(valid.shape):
        keep = valid.cpu().reshape(*valid.shape, *[1] * (a.dim() - 2))
        mine, theirs = mine.masked_fill(~keep, 0.0), theirs.masked_fill(~keep, 0.0)
    mine, theirs = mine.flatten(1) if a.dim() > 1 else mine[:, None], theirs.reshape(len(b), -1)
    scale = mine.norm(dim=1) * theirs.norm(dim=1)
    both_zero = (mine.norm(dim=1) == 0) & (theirs.norm(dim=1) == 0)
    similarity = (mine * theirs).sum(1) / scale.clamp_min(1e-300)
    return torch.where(both_zero, 1.0, similarity).clamp(-1.0, 1.0)


def _samples(valid: Tensor | None, samples: int) -> Tensor:
    """Real positions of each sample, at least one."""
    if valid is None or len(valid) != samples:
        return torch.ones(samples, dtype=torch.float64)
    return valid.cpu().sum(1).clamp_min(1).double()


def _bytes(kept: _Kept) -> int:
    held = [kept.nll, kept.top, *kept.outputs]
    held += [] if kept.log_probs is None else [kept.log_probs]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _room() -> int:
    """How many bytes the cache may take."""
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return _CACHE_BYTES
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_CACHE_BYTES, free // 4)
