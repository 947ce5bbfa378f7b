"""Numbers that a graph computes with: what has no result is NaN, infinity or a Problem."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import load
from attnopt.compiler.onnx import read_onnx
from attnopt.compiler.onnx.host import MOST, Host, host
from attnopt.compiler.onnx.shapes import tile
from tests.onnx_files import answers, node, save

onnx = pytest.importorskip("onnx")


def _file(path: Path, operator: str, numbers: list[Any], **more: Any) -> Path:
    """x times an operator of constants."""
    constants = {f"n{i}": number for i, number in enumerate(numbers)}
    kind = numbers[0].dtype if "to" not in more else np.dtype(np.int64)
    nodes = [node(operator, list(constants), ["c"], **more), node("Mul", ["x", "c"])]
    return save(path, nodes, {"x": (kind, ["b", 4])}, constants)


_F, _I = np.float32, np.int64


@pytest.mark.parametrize(
    ("operator", "numbers"),
    [
        ("Div", [_F(1), _F(0)]), ("Div", [_F(-1), _F(0)]), ("Div", [_F(0), _F(0)]),
        ("Reciprocal", [_F(0)]), ("Sqrt", [_F(-1)]), ("Pow", [_F(-8), _F(0.5)]),
        ("Pow", [_F(0), _F(-1)]), ("Pow", [_F(1e30), _F(9)]), ("Floor", [_F(np.inf)]),
        ("Ceil", [_F(np.nan)]), ("Pow", [_I(-2), _I(3)]),
    ],
)  # fmt: skip
def test_numbers_as_in_onnx_runtime(operator: str, numbers: list[Any], tmp_path: Path) -> None:
    path = _file(tmp_path / "a.onnx", operator, numbers)
    assert load(str(path)).exported is not None
    x = np.ones((1, 4), numbers[0].dtype)
    found, wanted = read_onnx(path)(torch.from_numpy(x))["y"], answers(path, {"x": x})[0]
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize(
    ("operator", "numbers", "more"),
    [
        ("Div", [_I(1), _I(0)], {}), ("Mod", [_I(1), _I(0)], {}), ("Pow", [_I(0), _I(-1)], {}),
        ("Pow", [_I(10), _I(10**9)], {}), ("Mul", [_I(2**62), _I(2**62)], {}),
        ("Cast", [_F(np.inf)], {"to": 7}), ("Cast", [_F(np.nan)], {"to": 7}),
    ],
)  # fmt: skip
def test_numbers_without_a_result(
    operator: str, numbers: list[Any], more: Any, tmp_path: Path
) -> None:
    with pytest.raises(Problem) as caught:
        load(str(_file(tmp_path / "a.onnx", operator, numbers, **more)))
    problem = caught.value
    assert problem.code == "A103" and operator in problem.where and problem.why


def test_an_empty_index(tmp_path: Path) -> None:
    nodes = [node("Gather", ["x", "i"], axis=1)]
    path = save(tmp_path / "a.onnx", nodes, {"x": (_F, [2, 4])}, {"i": np.array([], np.int64)})
    assert load(str(path)).exported is not None
    assert read_onnx(path)(torch.ones(2, 4))["y"].shape == (2, 0)


def test_an_empty_index_of_numbers(tmp_path: Path) -> None:
    nodes = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "i"])]
    path = save(tmp_path / "a.onnx", nodes, {"x": (_F, [2, 4])}, {"i": np.array([], np.int64)})
    assert read_onnx(path)(torch.ones(2, 4))["y"].shape == (0,)


def test_a_long_tile_is_a_tensor() -> None:
    made: Any = node("Tile", ["a", "n"])
    short = tile(made, host([1], torch.int64), host([MOST], torch.int64))
    assert isinstance(short, Host) and short.shape == (MOST,)
    long = tile(made, host([1], torch.int64), host([MOST + 1], torch.int64))
    assert isinstance(long, torch.Tensor) and long.shape == (MOST + 1,)


@pytest.mark.parametrize("text", ["-" * 200_000 + "1", "-" * 60_000 + "1", "[" * 5000, "{[]: 1}"])
def test_scopes_that_nest_deeply(text: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [node("Relu", ["x"])], {"x": (_F, ["b", 4])})
    model = onnx.load(path)
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
    path.write_bytes(model.SerializeToString())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load(str(path)).exported is not None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize("dims", [[-2, -8], [-1, 4], [2**62, 2**62, 16]])
@pytest.mark.parametrize("external", [False, True])
def test_sizes_that_cannot_be(dims: list[int], external: bool, tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 4), _F)}
    path = save(tmp_path / "a.onnx", [node("MatMul", ["x", "w"])], {"x": (_F, ["b", 4])}, weights)
    model = onnx.load(path)
    (made,) = model.graph.initializer
    (tmp_path / "w.bin").write_bytes(made.raw_data)
    made.ClearField("dims")
    made.dims.extend(dims)
    if external:
        onnx.external_data_helper.set_external_data(made, "w.bin", offset=0, length=64)
        made.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    with pytest.raises(Problem) as caught:
        load(str(path))
    assert caught.value.code in ("A103", "A129") and "w" in caught.value.what
