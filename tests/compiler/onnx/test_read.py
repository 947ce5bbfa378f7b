"""ONNX files that are damaged, foreign or too new are refused with a reason; the rest is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import load
from attnopt.compiler.onnx import read_onnx
from tests.onnx_files import answers, assert_as_runtime, decoder, node, onnx, save

X = {"x": (np.float32, ["b", 4])}
EYE = {"w": np.eye(4, dtype=np.float32) * 2}


def _refused(path: Path) -> Problem:
    with pytest.raises(Problem) as caught:
        load(str(path))
    return caught.value


@pytest.mark.parametrize("share", [0.02, 0.4, 0.97])
def test_a_file_that_is_cut_off(share: float, tmp_path: Path) -> None:
    path = decoder(tmp_path / "model.onnx")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    problem = _refused(path)
    assert problem.code == "A103" and "again" in problem.help


def test_noise_that_is_named_onnx(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a" + b"\xff" * 40)
    assert _refused(tmp_path / "model.onnx").code == "A103"
    (tmp_path / "model.onnx").write_bytes(b"hello, world")
    assert _refused(tmp_path / "model.onnx").code == "A106"


def test_it_is_known_by_its_content(tmp_path: Path) -> None:
    path = decoder(tmp_path / "model.onnx").rename(tmp_path / "model.bin")
    assert load(str(path)).kind == "onnx"


@pytest.mark.parametrize("opset", [11, 16, 25])
def test_opsets_that_are_not_read(opset: int, tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [node("Relu", ["x"])], X, opset=opset)
    problem = _refused(path)
    assert problem.code == "A125" and f"opset {opset}" in problem.what and "17 to 24" in problem.why


def test_every_unknown_operator_is_named(tmp_path: Path) -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Bernoulli", ["a"], ["b"], name="/layer/draw"),
        node("QAttention", ["b"], ["c"], name="/layer/attention", domain="com.microsoft"),
        node("Bernoulli", ["c"], ["y"]),
    ]
    problem = _refused(save(tmp_path / "a.onnx", nodes, X))
    assert problem.code == "A126" and "3 nodes of 4" in problem.what
    assert "/layer/draw (Bernoulli)" in problem.why and "Bernoulli_3 (Bernoulli)" in problem.why
    assert "/layer/attention (com.microsoft.QAttention)" in problem.why


def test_control_flow_is_refused_by_name(tmp_path: Path) -> None:
    empty = onnx.helper.make_graph([node("Identity", ["x"], ["z"])], "g", [], [
        onnx.helper.make_empty_tensor_value_info("z")])  # fmt: skip
    nodes = [node("If", ["c"], name="branch", then_branch=empty, else_branch=empty)]
    path = save(tmp_path / "a.onnx", nodes, {**X, "c": (np.bool_, [])})
    assert "branch (If)" in _refused(path).why


def test_a_value_that_nothing_writes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [node("Relu", ["z"], name="act")], X)
    problem = _refused(path)
    assert problem.code == "A103" and "act (Relu) reads `z`" in problem.why


def test_strings_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [node("Identity", ["x"])], {"x": (np.str_, ["b"])})
    problem = _refused(path)
    assert problem.code == "A128" and "STRING" in problem.what


def test_a_shape_that_depends_on_values(tmp_path: Path) -> None:
    nodes = [node("Reshape", ["x", "shape"], name="/model/view")]
    path = save(tmp_path / "a.onnx", nodes, {**X, "shape": (np.int64, [2])})
    problem = _refused(path)
    assert problem.code == "A127" and "/model/view (Reshape)" in problem.where


def _external(path: Path, location: str, **entries: int) -> Path:
    save(path, [node("MatMul", ["x", "w"])], X, EYE)
    model = onnx.load(path)
    (weights,) = model.graph.initializer
    data = weights.raw_data
    onnx.external_data_helper.set_external_data(weights, location, **entries)
    weights.ClearField("raw_data")
    (path.parent / "weights.bin").write_bytes(b"\0" * 16 + data)
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_in_a_file_beside_it(tmp_path: Path) -> None:
    path = _external(tmp_path / "a.onnx", "weights.bin", offset=16, length=64)
    x = torch.randn(3, 4)
    assert torch.equal(read_onnx(path)(x)["y"], 2 * x)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "", "link.bin"])
def test_weights_outside_of_the_directory(location: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = _external(tmp_path / "in" / "a.onnx", location, offset=0, length=64)
    (tmp_path / "weights.bin").write_bytes(b"\0" * 64)
    (tmp_path / "in" / "link.bin").symlink_to(tmp_path / "weights.bin")
    problem = _refused(path)
    assert problem.code == "A129" and "not in the model's directory" in problem.why


@pytest.mark.parametrize("entries", [{"offset": 40, "length": 64}, {"offset": 0, "length": 32}])
def test_weights_that_are_too_short(entries: dict[str, int], tmp_path: Path) -> None:
    problem = _refused(_external(tmp_path / "a.onnx", "weights.bin", **entries))
    assert problem.code == "A129"
    (tmp_path / "weights.bin").unlink()
    assert _refused(tmp_path / "a.onnx").code == "A129"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types(dtype: Any, tmp_path: Path) -> None:
    weights = {"w": np.arange(16, dtype=dtype).reshape(4, 4)}
    path = save(
        tmp_path / "a.onnx", [node("MatMul", ["x", "w"])], {"x": (dtype, ["b", 4])}, weights
    )
    x = torch.ones(2, 4, dtype=torch.from_numpy(weights["w"]).dtype)
    assert torch.equal(read_onnx(path)(x)["y"], answers(path, {"x": x.numpy()})[0])


def test_bfloat16_weights(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [node("Mul", ["x", "w"])], X, EYE)
    model = onnx.load(path)
    made = onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [4], [1.0, -2.0, 0.5, 3.0])
    model.graph.initializer[0].CopyFrom(made)
    path.write_bytes(model.SerializeToString())
    found = read_onnx(path)(torch.ones(1, 4))["y"]
    assert found.tolist() == [[1.0, -2.0, 0.5, 3.0]]


def test_a_weight_that_two_nodes_share_is_one_parameter(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["a", "w"], ["y"])]
    weights = {"w": np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)}
    path = save(tmp_path / "a.onnx", nodes, X, weights)
    module = read_onnx(path)
    assert len(list(module.parameters())) == 1
    x = torch.randn(3, 4)
    assert_as_runtime(module(x)["y"], answers(path, {"x": x.numpy()})[0])


def test_functions_of_the_file_are_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [node("Twice", ["x"], domain="own")], X)
    model = onnx.load(path)
    opsets = [onnx.helper.make_opsetid("", 21)]
    body = [node("Add", ["a", "a"], ["b"])]
    model.functions.append(onnx.helper.make_function("own", "Twice", ["a"], ["b"], body, opsets))
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    path.write_bytes(model.SerializeToString())
    x = torch.randn(3, 4)
    assert torch.equal(read_onnx(path)(x)["y"], x + x)


def test_names_that_python_does_not_take(tmp_path: Path) -> None:
    nodes = [node("Relu", ["input.1"], ["1"], name="/type/training")]
    path = save(tmp_path / "a.onnx", nodes, {"input.1": (np.float32, ["b", 4])}, outputs=("1",))
    assert read_onnx(path)(input_1=torch.ones(1, 4))["_1"].sum() == 4


def test_rows_without_a_key_give_zeros(tmp_path: Path) -> None:
    """How exporters write a softmax that bears rows of nothing but -inf."""
    nodes = [
        node("Softmax", ["x"], ["p"]), node("IsNaN", ["p"], ["n"]),
        node("Where", ["n", "zero", "p"], ["y"]),
    ]  # fmt: skip
    path = save(tmp_path / "a.onnx", nodes, X, {"zero": np.float32(0)})
    x = torch.randn(3, 4)
    x[1] = float("-inf")
    module = read_onnx(path)
    assert [n.operator for n in module.graph.nodes] == ["SafeSoftmax"]
    assert_as_runtime(module(x)["y"], answers(path, {"x": x.numpy()})[0])


def test_shape_arithmetic_stays_open(tmp_path: Path) -> None:
    nodes = [
        node("Shape", ["x"], ["s"]), node("Gather", ["s", "one"], ["n"]),
        node("Mul", ["n", "two"], ["m"]), node("Range", ["zero", "m", "one"], ["r"]),
        node("Unsqueeze", ["m", "axis"], ["u"]),
        node("ConstantOfShape", ["u"], ["c"], value=onnx.helper.make_tensor("v", 7, [1], [3])),
        node("Add", ["r", "c"], ["y"]),
    ]  # fmt: skip
    constants = {"zero": np.int64(0), "one": np.int64(1), "two": np.int64(2), "axis": np.array([0])}
    path = save(tmp_path / "a.onnx", nodes, {"x": (np.float32, ["b", "s"])}, constants)
    exported = load(str(path), length=5).exported
    assert exported is not None
    found = exported.module()(x=torch.zeros(3, 8))["y"]
    assert found.tolist() == list(range(3, 19))
