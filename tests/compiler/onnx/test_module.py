"""Names that Python does not take, and names that come out alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import load
from attnopt.compiler.onnx import read_onnx
from attnopt.compiler.onnx.graph import identifiers
from tests.onnx_files import node, save

KIND = (np.float32, ["b", 4])


def test_identifiers_are_unique() -> None:
    assert identifiers(["a.b", "a_b", "a:b", "lambda", "x²", "self"]) == {
        "a.b": "a_b_2", "a_b": "a_b", "a:b": "a_b_3", "lambda": "lambda_", "x²": "x_",
        "self": "self_",
    }  # fmt: skip


def test_outputs_that_come_out_alike_are_two(tmp_path: Path) -> None:
    nodes = [node("Neg", ["x"], ["y.1"]), node("Relu", ["x"], ["y_1"])]
    path = save(tmp_path / "a.onnx", nodes, {"x": KIND}, outputs=("y.1", "y_1"))
    found = read_onnx(path)(torch.ones(1, 4))
    assert {name: float(value[0, 0]) for name, value in found.items()} == {"y_1_2": -1, "y_1": 1}
    assert list(found) == ["y_1_2", "y_1"]


def test_inputs_that_come_out_alike_are_two(tmp_path: Path) -> None:
    nodes = [node("Sub", ["a.b", "a_b"])]
    path = save(tmp_path / "a.onnx", nodes, {"a.b": KIND, "a_b": KIND})
    exported = load(str(path)).exported
    assert exported is not None
    found = exported.module()(a_b_2=torch.full((3, 4), 5.0), a_b=torch.full((3, 4), 2.0))["y"]
    assert found.unique().tolist() == [3.0]


@pytest.mark.parametrize("name", ["lambda", "self", "None", "x²"])
def test_inputs_that_are_no_arguments(name: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [node("Relu", [name])], {name: KIND})
    assert load(str(path)).exported is not None


@pytest.mark.parametrize("name", ["/", ".", "//.", "forward"])
def test_names_without_a_letter(name: str, tmp_path: Path) -> None:
    nodes = [node("Mul", ["x", name], name=name)]
    path = save(tmp_path / "a.onnx", nodes, {"x": KIND}, {name: np.full(4, 2, np.float32)})
    assert load(str(path)).exported is not None
    assert read_onnx(path)(torch.ones(1, 4))["y"].unique().tolist() == [2.0]


def test_two_inputs_of_one_name(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [node("Relu", ["x"])], {"x": KIND})
    import onnx

    model = onnx.load(path)
    model.graph.input.append(model.graph.input[0])
    path.write_bytes(model.SerializeToString())
    with pytest.raises(Problem) as caught:
        load(str(path))
    assert caught.value.code == "A103"
