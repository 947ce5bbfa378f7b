"""Weights that become `Linear` keep apart whatever names the file gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnopt.compiler.onnx import read_onnx
from tests.onnx_files import answers, assert_as_runtime, node, save

_DRAW = np.random.default_rng(0)
X = {"x": (np.float32, ["b", 4])}


def _square() -> Any:
    return _DRAW.standard_normal((4, 4)).astype(np.float32)


def _same(nodes: list[Any], weights: dict[str, Any], path: Path) -> None:
    save(path, nodes, X, weights, outputs=("y", "z"))
    x = torch.randn(3, 4)
    found = read_onnx(path)(x)
    for mine, theirs in zip(found.values(), answers(path, {"x": x.numpy()}), strict=True):
        assert_as_runtime(mine, theirs)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["fc.weight", "onnx::MatMul_1"])
def test_a_weight_that_is_read_both_ways(name: str, turned: bool, tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", name], ["y"], name="/fc/MatMul"),
        node("Gemm", ["x", name], ["z"], name="/fc/Gemm", transB=1),
    ]
    _same(nodes[::-1] if turned else nodes, {name: _square()}, tmp_path / "a.onnx")


def test_a_name_that_another_weight_has(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "a.weight"], ["y"]), node("MatMul", ["x", "a.weight_T"], ["z"])]
    weights = {"a.weight": _square(), "a.weight_T": _square()}
    _same(nodes, weights, tmp_path / "a.onnx")


def test_a_name_that_a_value_of_the_graph_has(tmp_path: Path) -> None:
    nodes = [
        node("Neg", ["x"], ["a.weight_T"]), node("MatMul", ["a.weight_T", "a.weight"], ["y"]),
        node("Neg", ["a.weight_T"], ["z"]),
    ]  # fmt: skip
    _same(nodes, {"a.weight": _square()}, tmp_path / "a.onnx")
