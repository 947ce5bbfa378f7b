"""The data of one run: what is fitted on, what decides inside the search, what the verdict is
measured on, what is timed.

The first three never share a sequence. Timing runs on batches of the evaluation data, whose outcome
it cannot change, or on the one batch that all of them were cut from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.autotune.request import Wanted
from attnopt.autotune.result import Workload
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.data import lm_batches, read_text, sentence_batches, split_text
from attnopt.compiler.intake.inputs import load_batches
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Batch

CALIBRATION_TEXT, EVALUATION_TEXT = "calibration.txt", "eval.txt"
CALIBRATION_SEQUENCES, HELDOUT_SEQUENCES, EVALUATION_SEQUENCES = 24, 12, 48
FITTED_SEQUENCES = CALIBRATION_SEQUENCES + HELDOUT_SEQUENCES
TRAINING_SEQUENCES = 4096
LONGEST_DEFAULT = 1024
TIMED_BATCHES = 4


@dataclass(frozen=True)
class Data:
    """Batches by role.

    `real` is False where only made-up inputs exist: then nothing approximate may be judged on them.
    `training` holds the calibration batches and what the calibration text gives beyond these and
    the held-out ones; it is gathered where something is to be trained.
    """

    timing: tuple[Batch, ...]
    calibration: tuple[Batch, ...] = ()
    heldout: tuple[Batch, ...] = ()
    evaluation: tuple[Batch, ...] = ()
    real: bool = False
    words: dict[str, str] = field(default_factory=dict)
    training: tuple[Batch, ...] = ()

    def to(self, device: torch.device) -> Data:
        """The same data with the inputs on a device."""

        def moved(batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
            return tuple(batch.to(device) for batch in batches)

        return replace(
            self, timing=moved(self.timing), calibration=moved(self.calibration),
            heldout=moved(self.heldout), evaluation=moved(self.evaluation),
            training=moved(self.training),
        )  # fmt: skip

    @property
    def workload(self) -> Workload:
        """The size of the timed batches together: rows, longest length, and the share of real
        positions."""
        tensors = [_first(batch) for batch in self.timing]
        length = max((t.shape[1] for t in tensors if t.dim() > 1), default=1)
        valid = [batch.valid for batch in self.timing if batch.valid is not None]
        cells = sum(v.numel() for v in valid)
        fill = sum(int(v.sum()) for v in valid) / cells if cells else 1.0
        rows = max(t.shape[0] for t in tensors)
        return Workload(rows, length, fill, self.words.get("timing", ""))


def gather(loaded: Loaded, wanted: Wanted, source: str, training: bool = False) -> Data:
    """The data for a loaded model, with all of the text to train on where that is wanted.

    Raises `Problem` A405 where a text is given and cannot be used.
    """
    example = as_batch(loaded.args, loaded.kwargs)
    calibration, evaluation = _texts(wanted, source)
    if loaded.tokenizer is not None and evaluation is not None:
        return _from_text(loaded, wanted, calibration, evaluation, training)
    if wanted.text is not None:
        raise Problem(
            "A405",
            "--text needs a tokenizer beside the model",
            where=source,
            help="save the tokenizer into the model's directory, "
            "or give tensors with --inputs FILE",
        )
    if wanted.inputs is not None:
        return _from_inputs(
            [as_batch(*batch) for batch in load_batches(wanted.inputs)], wanted.inputs
        )
    said = "; ".join(loaded.notes) or "the example inputs that were given"
    return Data((example,), words={"timing": said})


def as_batch(args: Sequence[Any], kwargs: Any) -> Batch:
    """A `Batch` whose valid positions come from its `attention_mask`."""
    mask = kwargs.get("attention_mask")
    valid = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    return Batch(tuple(args), dict(kwargs), valid)


def _texts(wanted: Wanted, source: str) -> tuple[str | None, tuple[str, str] | None]:
    """The calibration text, and the evaluation text with its name."""
    home = Path(source)
    evaluation = wanted.text
    if evaluation is None and wanted.inputs is None and (home / EVALUATION_TEXT).is_file():
        evaluation = home / EVALUATION_TEXT
    if evaluation is None:
        return None, None
    calibration = wanted.calibration
    if calibration is None and (home / CALIBRATION_TEXT).is_file():
        calibration = home / CALIBRATION_TEXT
    text = read_text(evaluation)
    if calibration is not None:
        return read_text(calibration), (text, evaluation.name)
    first, second = split_text(text)
    if not first.strip() or not second.strip():
        raise Problem(
            "A113", "the text is too short to be split into calibration and evaluation",
            where=str(evaluation), why="one of its halves, cut at a line end, is empty",
            help="give more text, or a text of its own to fit on with --calibration FILE",
        )  # fmt: skip
    return first, (second, f"the second half of {evaluation.name}")


def _from_text(
    loaded: Loaded,
    wanted: Wanted,
    calibration: str | None,
    evaluation: tuple[str, str],
    training: bool,
) -> Data:
    assert calibration is not None
    rows = wanted.batch or (1 if loaded.task == "causal-lm" else 8)
    text, name = evaluation
    more = TRAINING_SEQUENCES if training else 0
    if loaded.task == "causal-lm" or wanted.length is not None:
        length = wanted.length or _length(loaded)
        masked = "attention_mask" in loaded.kwargs
        most = FITTED_SEQUENCES
        fitted = _chunks(loaded, calibration, length, rows, most + more, masked)
        judged = _chunks(loaded, text, length, rows, EVALUATION_SEQUENCES, masked)
        timed = judged[:1]
    else:
        most = 4 * FITTED_SEQUENCES
        fitted = _sentences(loaded, calibration, rows, most + more)
        judged = _sentences(loaded, text, rows, 4 * EVALUATION_SEQUENCES)
        timed = judged[:TIMED_BATCHES]
    known = -(-most // rows)
    fitted, rest = fitted[:known], fitted[known:]
    cut = max(1, len(fitted) * CALIBRATION_SEQUENCES // FITTED_SEQUENCES)
    words = {
        "calibration": _say(fitted[:cut]),
        "heldout": _say(fitted[cut:]),
        "evaluation": f"{name}: {_say(judged)}",
        "timing": f"{name}: {_say(timed)}",
    }
    trained = (*fitted[:cut], *rest) if training else ()
    if training:
        words["training"] = _say(trained)
    return Data(
        tuple(timed), tuple(fitted[:cut]), tuple(fitted[cut:]), tuple(judged), True, words, trained
    )  # fmt: skip


def _chunks(
    loaded: Loaded, text: str, length: int, rows: int, most: int, masked: bool
) -> list[Batch]:
    made = lm_batches(loaded.tokenizer, text, length, rows, max(1, -(-most // rows)))
    if masked:
        made = [(a, {**kw, "attention_mask": torch.ones_like(kw["input_ids"])}) for a, kw in made]
    return [as_batch(*batch) for batch in made]


def _sentences(loaded: Loaded, text: str, rows: int, most: int) -> list[Batch]:
    limit = getattr(getattr(loaded.module, "hf", None), "config", None)
    longest = getattr(limit, "max_position_embeddings", None)
    made = sentence_batches(
        loaded.tokenizer, text.splitlines(), rows, max(1, -(-most // rows)), longest
    )
    full = [batch for batch in made if _first(as_batch(*batch)).shape[0] == rows]
    return [as_batch(*batch) for batch in full or made]


def _length(loaded: Loaded) -> int:
    config = getattr(getattr(loaded.module, "hf", None), "config", None)
    limit = getattr(config, "max_position_embeddings", None) or LONGEST_DEFAULT
    return min(int(limit), LONGEST_DEFAULT)


def _from_inputs(batches: list[Batch], path: Path) -> Data:
    """Thirds by role; one batch alone is cut into pieces for them, and timed whole."""
    pieces = _rows(batches[0]) if len(batches) == 1 else batches
    third = len(pieces) // 3
    roles = {
        "calibration": pieces[:third],
        "heldout": pieces[third : 2 * third],
        "evaluation": pieces[2 * third :],
    }
    timed = batches if third == 0 or len(batches) == 1 else roles["evaluation"][-TIMED_BATCHES:]
    unit = "batches" if pieces is batches else "pieces of its batch"
    words = {r: f"{path.name}: {len(p)} of {len(pieces)} {unit}" for r, p in roles.items()}
    words["timing"] = f"{path.name}: {len(timed)} of {len(batches)} batches"
    made = {role: tuple(part) for role, part in roles.items()}
    return Data(tuple(timed), **made, real=third > 0, words=words)


def _rows(batch: Batch) -> list[Batch]:
    """One batch of many rows as several batches; itself when it has too few rows or uneven
    inputs."""
    tensors = [
        x for x in (*batch.args, *batch.kwargs.values()) if isinstance(x, Tensor) and x.dim()
    ]
    rows = {t.shape[0] for t in tensors}
    if len(rows) != 1 or min(rows) < 12:
        return [batch]
    size = -(-rows.pop() // 12)

    def cut(value: Any, i: int) -> Any:
        return (
            value[i * size : (i + 1) * size] if isinstance(value, Tensor) and value.dim() else value
        )

    count = -(-tensors[0].shape[0] // size)
    return [
        as_batch([cut(a, i) for a in batch.args], {k: cut(v, i) for k, v in batch.kwargs.items()})
        for i in range(count)
    ]


def _first(batch: Batch) -> Tensor:
    return next(x for x in (*batch.args, *batch.kwargs.values()) if isinstance(x, Tensor))


def _say(batches: Sequence[Batch]) -> str:
    if not batches:
        return "none"
    rows = sum(_first(batch).shape[0] for batch in batches)
    longest = max(_first(batch).shape[1] for batch in batches)
    return f"{rows} sequences of up to {longest} tokens"
