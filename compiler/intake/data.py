"""Text to batches, for calibration and for measuring accuracy; the same text always gives the same
batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.inputs import Batch


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises `Problem` A113 (missing, not text, empty)."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Problem("A113", "there is no such text file", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise Problem(
            "A113",
            "the file is not text in UTF-8",
            where=str(path),
            why=str(error),
            help="convert it, for instance with iconv",
        ) from error
    except OSError as error:
        raise Problem(
            "A113", "the text file cannot be read", where=str(path), why=str(error)
        ) from error
    if not text.strip():
        raise Problem("A113", "the text file is empty", where=str(path))
    return text


def split_text(text: str, share: float = 0.5) -> tuple[str, str]:
    """Cut the text in two at the line end nearest below `share` of its length: calibration and
    evaluation apart.
    """
    cut = text.rfind("\n", 0, int(len(text) * share)) + 1
    return text[:cut], text[cut:]


def lm_batches(
    tokenizer: Any, text: str, length: int, batch: int, limit: int | None = None
) -> list[Batch]:
    """Contiguous chunks of the text's tokens: `input_ids` int64 `[batch, length]`, at most `limit`
    batches.

    A last batch that is not full is left out, unless it is the only one. Raises `Problem` A113 for
    a text shorter than one chunk.
    """
    ids = _token_ids(tokenizer, text)
    rows = len(ids) // length
    if rows == 0:
        raise Problem(
            "A113",
            f"the text has {len(ids)} tokens, too few for one sequence of {length}",
            help="give more text, or a smaller --length",
        )
    grid = torch.tensor(ids[: rows * length], dtype=torch.int64).view(rows, length)
    full = max(rows // batch, 1)
    count = full if limit is None else min(full, limit)
    return [((), {"input_ids": grid[i * batch : (i + 1) * batch].clone()}) for i in range(count)]


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of the whole text, without special tokens; longer than a model's limit on purpose."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def sentence_batches(
    tokenizer: Any,
    lines: Sequence[str],
    batch: int,
    limit: int | None = None,
    max_length: int | None = None,
) -> list[Batch]:
    """One sequence per line that is not blank, in order, padded on the right to the longest of its
    batch.

    `input_ids` and `attention_mask` are int64 `[batch, longest]`, the mask 1 on real tokens. Raises
    `Problem` A113 when all lines are blank.
    """
    kept = [line.strip() for line in lines if line.strip()]
    if not kept:
        raise Problem("A113", "the text has no line that is not blank")
    if limit is not None:
        kept = kept[: limit * batch]
    cut = {"truncation": True, "max_length": max_length} if max_length else {}
    ids = [list(tokenizer(line, **cut)["input_ids"]) for line in kept]
    pad = tokenizer.pad_token_id
    groups = [ids[i : i + batch] for i in range(0, len(ids), batch)]
    return [((), _padded(group, 0 if pad is None else int(pad))) for group in groups]


def _padded(rows: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(len(row) for row in rows)
    full = [row + [pad] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(full, dtype=torch.int64),
        "attention_mask": torch.tensor(mask, dtype=torch.int64),
    }
