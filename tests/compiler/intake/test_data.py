"""Text becomes the same batches every time, contiguous or padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.data import lm_batches, read_text, sentence_batches, split_text


class Letters:
    """One token per character, a start token on request; pads with 0."""

    pad_token_id = 0

    def __call__(
        self,
        text: str,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        verbose: bool = True,
    ) -> dict[str, Any]:
        ids = ([1] if add_special_tokens else []) + [ord(letter) for letter in text]
        return {"input_ids": ids[:max_length] if truncation else ids}


def test_language_model_batches_are_contiguous() -> None:
    text = "".join(chr(65 + i) for i in range(26))
    batches = lm_batches(Letters(), text, length=4, batch=2)
    assert [kwargs["input_ids"].shape for _, kwargs in batches] == [(2, 4)] * 3
    joined = torch.cat([kwargs["input_ids"].flatten() for _, kwargs in batches])
    assert joined.tolist() == [65 + i for i in range(24)]
    assert all(args == () and list(kwargs) == ["input_ids"] for args, kwargs in batches)


def test_limit_and_short_text() -> None:
    assert len(lm_batches(Letters(), "x" * 100, 4, 2, limit=3)) == 3
    [(_, only)] = lm_batches(Letters(), "x" * 9, 4, 8)
    assert only["input_ids"].shape == (2, 4)
    with pytest.raises(Problem, match="too few"):
        lm_batches(Letters(), "xyz", 4, 1)


def test_sentences_are_padded_to_the_longest_of_their_batch() -> None:
    lines = ["ab", "", "abcd", "   ", "a"]
    first, second = sentence_batches(Letters(), lines, batch=2)
    assert first[1]["input_ids"].tolist() == [[1, 97, 98, 0, 0], [1, 97, 98, 99, 100]]
    assert first[1]["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert second[1]["input_ids"].tolist() == [[1, 97]]


def test_sentences_are_cut_and_limited() -> None:
    [(_, batch)] = sentence_batches(Letters(), ["abcdef"] * 9, batch=2, limit=1, max_length=4)
    assert batch["input_ids"].shape == (2, 4) and bool(batch["attention_mask"].all())


def test_no_sentence_at_all() -> None:
    with pytest.raises(Problem, match="not blank"):
        sentence_batches(Letters(), ["", " "], 2)


def test_split_keeps_every_line_on_one_side() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    first, second = split_text(text, 0.3)
    assert first + second == text and first.endswith("\n") and second.startswith("line")
    assert 0.25 < len(first) / len(text) <= 0.3


@pytest.mark.parametrize(
    ("content", "said"), [(None, "no such"), (b"\xff\xfe\x00", "not text"), (b" \n", "empty")]
)
def test_texts_that_cannot_be_read(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Problem, match=said) as caught:
        read_text(path)
    assert caught.value.code == "A113"


def test_a_directory_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="cannot be read"):
        read_text(tmp_path)
