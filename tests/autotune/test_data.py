"""What a run's data is used for: which batches have which role, and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnopt.autotune.data import Data, gather
from attnopt.autotune.request import Wanted
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded


class Words:
    """A tokenizer of one token per character."""

    pad_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def _loaded(tokenizer: Any = None) -> Loaded:
    example = (torch.randn(1, 3),)
    return Loaded(nn.Identity(), None, example, {}, "model", "pickle", tokenizer=tokenizer)


def _data(folder: Path, batches: list[torch.Tensor], **sizes: Any) -> Data:
    path = folder / "inputs.pt"
    torch.save(batches, path)
    return gather(_loaded(), Wanted(inputs=path, **sizes), "model.pt")


def _numbers(batches: Any) -> list[int]:
    return [int(batch.args[0][0, 0]) for batch in batches]


@pytest.mark.parametrize(("count", "timed"), [(3, 1), (4, 2), (11, 4), (12, 4)])
def test_tensors_have_one_role_each(tmp_path: Path, count: int, timed: int) -> None:
    data = _data(tmp_path, [torch.full((2, 3), float(i)) for i in range(count)])
    roles = [*data.calibration, *data.heldout, *data.evaluation]
    assert _numbers(roles) == list(range(count)) and data.real
    assert _numbers(data.timing) == list(range(count - timed, count))
    assert data.words == {
        role: f"inputs.pt: {len(getattr(data, role))} of {count} batches"
        for role in ("calibration", "heldout", "evaluation", "timing")
    }


def test_one_batch_is_cut_for_its_roles_and_timed_whole(tmp_path: Path) -> None:
    rows = torch.arange(24.0)[:, None].expand(24, 3)
    data = _data(tmp_path, [rows])
    (timed,) = data.timing
    assert torch.equal(timed.args[0], rows) and data.workload.batch == 24
    pieces = [*data.calibration, *data.heldout, *data.evaluation]
    assert torch.equal(torch.cat([piece.args[0] for piece in pieces]), rows) and data.real
    assert data.words["heldout"] == "inputs.pt: 4 of 12 pieces of its batch"
    assert data.words["timing"] == "inputs.pt: 1 of 1 batches"


def test_too_few_tensors_are_for_measuring_alone(tmp_path: Path) -> None:
    data = _data(tmp_path, [torch.ones(2, 3), torch.zeros(2, 3)])
    assert not data.real and not data.calibration and not data.heldout
    assert len(data.timing) == len(data.evaluation) == 2


@pytest.mark.parametrize("size", ["batch", "length"])
def test_sizes_are_not_for_tensors(tmp_path: Path, size: str) -> None:
    with pytest.raises(Problem, match=f"--{size}") as caught:
        _data(tmp_path, [torch.ones(2, 3)], **{size: 4})
    assert caught.value.code == "A405"


@pytest.mark.parametrize(
    "text", ["a long first line\nshort\n", "one line", "short\nlong" * 2 + "\n"]
)
def test_a_text_too_short_to_be_split(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.txt"
    path.write_text(text)
    wanted = Wanted(text=path, batch=1)
    if text.startswith("short"):
        assert gather(_loaded(Words()), wanted, "model").calibration
        return
    with pytest.raises(Problem, match="too short to be split") as caught:
        gather(_loaded(Words()), wanted, "model")
    assert caught.value.code == "A113" and "--calibration" in caught.value.help
    assert gather(_loaded(Words()), Wanted(path, path, batch=1), "model").evaluation


def test_what_is_trained_on_is_apart_from_what_is_judged_on(tmp_path: Path) -> None:
    """Characters as tokens: every sequence of a text of distinct ones is found again."""
    for name, first in (("fit", 1_000), ("judge", 90_000)):
        letters = "".join(chr(first + i) for i in range(45 * 4))
        (tmp_path / name).write_text(letters, encoding="utf-8")
    loaded = replace(_loaded(Words()), task="causal-lm")
    wanted = Wanted(tmp_path / "judge", tmp_path / "fit", length=4)
    plain, data = (gather(loaded, wanted, "m", training=more) for more in (False, True))
    assert not plain.training and "training" not in plain.words

    def seen(batches: Any) -> set[int]:
        return {int(i) for batch in batches for i in batch.kwargs["input_ids"].flatten()}

    assert seen(data.calibration) < seen(data.training)
    assert len(data.training) == 24 + 9 and data.words["training"].startswith("33 sequences")
    assert not seen(data.training) & (seen(data.heldout) | seen(data.evaluation))
    for role in ("calibration", "heldout", "evaluation"):
        assert seen(getattr(data, role)) == seen(getattr(plain, role))
