"""Resize against ONNX Runtime, and what of it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import load
from attnopt.compiler.onnx import read_onnx
from tests.onnx_files import answers, assert_as_runtime, node, save

IMAGE = np.random.default_rng(0).standard_normal((1, 2, 5, 6)).astype(np.float32)
X = {"x": (np.float32, list(IMAGE.shape))}
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric",
           "nearest_mode": "floor"}  # fmt: skip


def _resize(path: Path, sizes: list[int] | None, scales: list[float] | None, **more: Any) -> Path:
    constants = {}
    if sizes is not None:
        constants["sizes"] = np.array(sizes)
    if scales is not None:
        constants["scales"] = np.array(scales, np.float32)
    inputs = ["x", "", "scales" if scales else "", *(["sizes"] if sizes else [])]
    return save(path, [node("Resize", inputs, **more)], X, constants)


@pytest.mark.parametrize("scales", [[1, 1, 2, 3], [1, 1, 1.5, 0.7], [1, 1, 0.5, 0.5]])
@pytest.mark.parametrize(
    "more",
    [
        NEAREST,
        {"mode": "linear"},
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        {"mode": "cubic", "coordinate_transformation_mode": "pytorch_half_pixel"},
    ],
    ids=["nearest", "linear", "corners", "cubic"],
)
def test_scales(scales: list[float], more: dict[str, Any], tmp_path: Path) -> None:
    path = _resize(tmp_path / "a.onnx", None, scales, exclude_outside=0, **more)
    found = read_onnx(path)(torch.from_numpy(IMAGE))["y"]
    assert_as_runtime(found, answers(path, {"x": IMAGE})[0])


def test_scales_that_are_put_together(tmp_path: Path) -> None:
    """How torch's older exporter writes them."""
    nodes = [
        node("Concat", ["ones", "by"], ["s"], axis=0),
        node("Resize", ["x", "", "s"], **NEAREST),
    ]
    constants = {"ones": np.ones(2, np.float32), "by": np.array([2, 2], np.float32)}
    path = save(tmp_path / "a.onnx", nodes, {"x": (np.float32, ["b", 2, 5, 6])}, constants)
    exported = load(str(path), batch=2).exported
    assert exported is not None
    found = exported.module()(x=torch.from_numpy(IMAGE).expand(3, -1, -1, -1).contiguous())["y"]
    assert_as_runtime(found[:1], answers(path, {"x": IMAGE})[0])


@pytest.mark.parametrize(
    ("sizes", "scales", "more", "why"),
    [
        ([1, 2, 8, 8], None, {"mode": "cubic", "exclude_outside": 1}, "`exclude_outside` of 1"),
        ([1, 2, 9, 7], None, {"mode": "linear", "keep_aspect_ratio_policy": "not_larger"},
         "`keep_aspect_ratio_policy` of not_larger"),
        ([1, 2, 1, 9], None,
         {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}, "the size 1"),
        (None, [1, 1, 0.2, 1],
         {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}, "the size 1"),
        ([1, 4, 5, 6], None, {"mode": "linear"}, "the channels"),
        (None, [1, 2, 2, 2], {"mode": "linear"}, "the channels"),
    ],
)  # fmt: skip
def test_what_is_refused(
    sizes: Any, scales: Any, more: dict[str, Any], why: str, tmp_path: Path
) -> None:
    path = _resize(tmp_path / "a.onnx", sizes, scales, **more)
    with pytest.raises(Problem) as caught:
        load(str(path))
    assert caught.value.code == "A126" and why in caught.value.why
