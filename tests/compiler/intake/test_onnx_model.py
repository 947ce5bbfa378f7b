"""Example inputs, open sizes and the kind of work of an ONNX model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import load
from tests.onnx_files import Decoder, answers, assert_as_runtime, decoder, node, old_export, save


def _nothing(folder: Path, **inputs: tuple[type, list[int | str]]) -> Path:
    """A graph that sums each input up."""
    nodes = [node("ReduceSum", [name], [f"{name}_sum"]) for name in inputs]
    return save(folder / "a.onnx", nodes, inputs, outputs=[f"{name}_sum" for name in inputs])


def test_a_language_model(tmp_path: Path) -> None:
    loaded = load(str(decoder(tmp_path / "model.onnx")), batch=3, length=9)
    tokens = loaded.kwargs["input_ids"]
    assert tokens.shape == (3, 9) and tokens.min() >= 0 and tokens.max() < 40
    assert (loaded.task, loaded.kind, loaded.name) == ("causal-lm", "onnx", "model")
    assert loaded.sequence_dims["input_ids"].keys() == {0, 1}
    assert "made from the graph's inputs" in loaded.notes[0]


@pytest.mark.parametrize("shape", [(2, 11), (1, 5), (4, 30)])
def test_it_computes_what_onnx_runtime_does(shape: tuple[int, int], tmp_path: Path) -> None:
    path = decoder(tmp_path / "model.onnx", window=4)
    exported = load(str(path), length=9).exported
    assert exported is not None
    tokens = torch.randint(0, 40, shape)
    found = exported.module()(input_ids=tokens)["logits"]
    assert_as_runtime(found, answers(path, {"input_ids": tokens})[0])


class Looks(nn.Module):
    """A decoder whose first token sees the last."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Decoder()

    def forward(self, input_ids: Tensor) -> Tensor:
        made: Tensor = self.inner(input_ids.flip(1)).flip(1)
        return made


def test_what_looks_ahead_is_no_causal_model(tmp_path: Path) -> None:
    tokens = torch.randint(0, 40, (2, 11))
    path = old_export(Looks().eval(), {"input_ids": tokens}, tmp_path / "a.onnx", "logits")
    assert load(str(path), length=9).task == "encoder"


def test_inputs_by_name_and_size(tmp_path: Path) -> None:
    path = _nothing(
        tmp_path, attention_mask=(np.int64, ["b", "s"]), position_ids=(np.int64, ["b", "s"]),
        token_type_ids=(np.int64, ["b", "s"]), vectors=(np.float16, ["b", "s", 7]),
    )  # fmt: skip
    made = load(str(path), batch=3, length=5).kwargs
    assert made["attention_mask"].eq(1).all() and made["token_type_ids"].eq(0).all()
    assert made["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 3
    assert made["vectors"].shape == (3, 5, 7) and made["vectors"].dtype == torch.float16


def test_inputs_that_are_given(tmp_path: Path) -> None:
    path = decoder(tmp_path / "model.onnx")
    torch.save({"input_ids": torch.zeros(1, 6, dtype=torch.int64)}, tmp_path / "in.pt")
    loaded = load(str(path), inputs=tmp_path / "in.pt")
    assert loaded.kwargs["input_ids"].shape == (1, 6)
    assert 0 in loaded.sequence_dims["input_ids"]  # one row stands for any number


@pytest.mark.parametrize("shape", [["b", 3, "h", "w"], ["b", 4, "past", 8]])
def test_sizes_that_cannot_be_guessed(shape: list[int | str], tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        load(str(_nothing(tmp_path, past_key_values=(np.float32, shape))))
    assert caught.value.code == "A111" and "--inputs" in caught.value.help


def test_an_image_of_a_fixed_size(tmp_path: Path) -> None:
    loaded = load(str(_nothing(tmp_path, pixel_values=(np.float32, ["b", 3, 8, 8]))))
    assert loaded.task == "vision"
    assert set(loaded.sequence_dims["pixel_values"]) == {0}


def test_choices_that_a_graph_has_made(tmp_path: Path) -> None:
    path = decoder(tmp_path / "model.onnx")
    for option in ({"dtype": "float16"}, {"attention": "eager"}):
        with pytest.raises(Problem) as caught:
            load(str(path), **option)  # type: ignore[arg-type]
        assert caught.value.code == "A114"


def test_wrong_inputs_are_told(tmp_path: Path) -> None:
    path = decoder(tmp_path / "model.onnx")
    torch.save({"tokens": torch.zeros(1, 6, dtype=torch.int64)}, tmp_path / "in.pt")
    with pytest.raises(Problem) as caught:
        load(str(path), inputs=tmp_path / "in.pt")
    assert caught.value.code == "A109"
