"""Good files and callables, each with its example inputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import load
from tests.tolerance import assert_close


def test_pickle_computes_what_was_saved(tmp_path: Path, inputs: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    torch.save(model, tmp_path / "model.pt")
    loaded = load(str(tmp_path / "model.pt"), inputs=inputs)
    assert loaded.module is not None and loaded.exported is None
    assert (loaded.name, loaded.kind, loaded.root_prefix) == ("model", "pickle", "")
    assert_close(loaded.module(*loaded.args), model.eval()(torch.ones(2, 4)))


def test_the_suffix_does_not_matter(linear: Path, exported: Path, inputs: Path) -> None:
    shutil.copy(linear, linear.with_suffix(".pt2"))  # overwrites the exported file of that name
    assert load(str(linear.with_suffix(".pt2")), inputs=inputs).kind == "pickle"


def test_export_under_another_suffix(exported: Path) -> None:
    path = exported.rename(exported.with_suffix(".bin"))
    loaded = load(str(path))
    assert loaded.kind == "export" and loaded.module is None and loaded.exported is not None


def test_export_brings_its_inputs_and_open_sizes(exported: Path) -> None:
    loaded = load(str(exported))
    assert loaded.args[0].shape == (2, 4)
    assert list(loaded.sequence_dims) == ["input"] and list(loaded.sequence_dims["input"]) == [0]
    assert any("saved with the program" in note for note in loaded.notes)


def test_export_takes_other_inputs(exported: Path, tmp_path: Path) -> None:
    torch.save(torch.zeros(7, 4), tmp_path / "x.pt")
    assert load(str(exported), inputs=tmp_path / "x.pt").args[0].shape == (7, 4)


def test_export_with_guards_symbols_and_nested_inputs(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, pair: dict[str, torch.Tensor], *, gain: torch.Tensor) -> torch.Tensor:
            left, right = pair["left"], pair["right"]
            return (left @ right.transpose(0, 1)) * gain if left.shape[1] > 3 else left

    auto = torch.export.Dim.AUTO
    pair = {"left": torch.randn(6, 8), "right": torch.randn(5, 8)}
    shapes = {"pair": {"left": {0: auto, 1: auto}, "right": {0: auto, 1: auto}}, "gain": None}
    program = torch.export.export(Nested(), (pair,), {"gain": torch.ones(1)}, dynamic_shapes=shapes)
    assert program._guards_code  # the case is about them
    torch.export.save(program, tmp_path / "nested.pt2")
    assert load(str(tmp_path / "nested.pt2")).kwargs["gain"].shape == (1,)


def test_export_with_an_operator_of_this_project(tmp_path: Path) -> None:
    from attnopt.compiler.ops import ATTENTION
    from attnopt.compiler.spec import AttentionSpec

    spec = AttentionSpec(heads=2, kv_heads=1, head_dim=4, v_dim=4, scale=0.5).text

    class Attend(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = ATTENTION(q, k, k, [], spec)
            return out

    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4)
    torch.export.save(torch.export.export(Attend(), (q, k)), tmp_path / "own.pt2")
    loaded = load(str(tmp_path / "own.pt2"))
    assert loaded.exported is not None
    assert_close(loaded.exported.module()(q, k), Attend()(q, k))


def test_dtype_and_attention_of_an_export_are_fixed(exported: Path) -> None:
    with pytest.raises(Problem) as caught:
        load(str(exported), dtype=torch.float64)
    assert caught.value.code == "A114"


def test_dtype_override(linear: Path, tmp_path: Path) -> None:
    torch.save(torch.ones(2, 4, dtype=torch.float64), tmp_path / "x.pt")
    loaded = load(str(linear), inputs=tmp_path / "x.pt", dtype=torch.float64)
    assert loaded.module is not None
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float64}


def test_a_checkpoint_that_holds_one_module(tmp_path: Path, inputs: Path) -> None:
    torch.save({"epoch": 3, "model": nn.Linear(4, 4)}, tmp_path / "model.pt")
    loaded = load(str(tmp_path / "model.pt"), inputs=inputs)
    assert any("'model'" in note for note in loaded.notes)


def test_callable_with_inputs(stranger: Path) -> None:
    loaded = load("strangers:build_with_inputs")
    assert (loaded.kind, loaded.name) == ("callable", "build_with_inputs")
    assert loaded.args[0].shape == (2, 4)
    assert loaded.module is not None and not loaded.module.training


def test_callable_without_inputs(stranger: Path, inputs: Path) -> None:
    assert load("strangers:build", inputs=inputs).kind == "callable"
    with pytest.raises(Problem) as caught:
        load("strangers:build")
    assert caught.value.code == "A111"


def test_given_inputs_win_over_those_of_the_callable(stranger: Path, tmp_path: Path) -> None:
    torch.save(torch.ones(5, 4), tmp_path / "x.pt")
    assert load("strangers:build_with_inputs", inputs=tmp_path / "x.pt").args[0].shape == (5, 4)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere_at_all:build", "no module nowhere_at_all"),
        ("strangers:missing", "strangers has no missing"),
        ("strangers:number", "returned a int"),
        ("strangers:__name__", "a str, not a function"),
    ],
)
def test_callable_that_is_none(stranger: Path, source: str, said: str) -> None:
    with pytest.raises(Problem) as caught:
        load(source)
    assert caught.value.code == "A112" and said in caught.value.what


def test_errors_of_the_users_function_stay_theirs(stranger: Path) -> None:
    with pytest.raises(LookupError, match="the user's own code"):
        load("strangers:broken")


def test_text_needs_a_tokenizer(linear: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("words")
    with pytest.raises(Problem) as caught:
        load(str(linear), text=tmp_path / "t.txt")
    assert caught.value.code == "A117"
