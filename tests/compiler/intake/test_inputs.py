"""Example inputs in every layout, and the ones that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.inputs import load_batches, varying

X, Y = torch.ones(2, 3), torch.zeros(2, 3)


def saved(value: Any, folder: Path) -> Path:
    torch.save(value, folder / "inputs.pt")
    return folder / "inputs.pt"


@pytest.mark.parametrize(
    ("value", "positional", "named"),
    [
        (X, 1, []),
        ((X, Y), 2, []),
        ({"x": X, "y": Y}, 0, ["x", "y"]),
        (((X,), {"y": Y}), 1, ["y"]),
        ((X, {"y": Y}), 2, []),
    ],
)
def test_layouts(value: Any, positional: int, named: list[str], tmp_path: Path) -> None:
    [(args, kwargs)] = load_batches(saved(value, tmp_path))
    assert len(args) == positional and list(kwargs) == named


def test_a_list_is_a_list_of_batches(tmp_path: Path) -> None:
    batches = load_batches(saved([X, (X, Y), {"x": X}], tmp_path))
    assert [(len(args), len(kwargs)) for args, kwargs in batches] == [(1, 0), (2, 0), (0, 1)]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ([], "A110"),
        ("text", "A110"),
        ({"x": 3}, "A110"),
        ({1: X}, "A110"),
        (torch.tensor(1.0), "A111"),
        (torch.ones(0, 4), "A111"),
        (nn.Linear(2, 2), "A102"),
    ],
)
def test_refused(value: Any, code: str, tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        load_batches(saved(value, tmp_path))
    assert caught.value.code == code


def test_a_file_that_torch_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("1 2 3")
    with pytest.raises(Problem) as caught:
        load_batches(tmp_path / "x.pt")
    assert caught.value.code == "A106"


class Forward(nn.Module):
    def forward(self, ids: torch.Tensor, states: torch.Tensor, image: torch.Tensor) -> None: ...


def test_varying_dimensions_by_shape() -> None:
    ids, states, image = torch.ones(2, 7).long(), torch.ones(2, 7, 4), torch.ones(2, 3, 8, 8)
    assert varying(Forward(), (ids,), {"states": states, "image": image}) == {
        "ids": {0: "batch", 1: "seq"},
        "states": {0: "batch", 1: "seq"},
        "image": {0: "batch"},
    }


def test_inputs_that_do_not_fit_the_signature_vary_nowhere() -> None:
    assert varying(Forward(), (X,), {}) == {}
