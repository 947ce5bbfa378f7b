"""An operator with an attribute that it does not read is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from attnopt.compiler.errors import Problem
from attnopt.compiler.onnx import read_onnx
from attnopt.compiler.onnx.table import names
from tests.onnx_files import MICROSOFT, node, save

onnx = pytest.importorskip("onnx")

X = {"x": (np.float32, [2, 4])}


def test_an_attribute_that_is_not_read(tmp_path: Path) -> None:
    made = node("Relu", ["x"], name="/act", slope=0.5)
    with pytest.raises(Problem) as caught:
        read_onnx(save(tmp_path / "a.onnx", [made], X))
    assert caught.value.code == "A126" and "/act (Relu)" in caught.value.what
    assert "`slope` of 0.5" in caught.value.why


def test_an_attribute_of_an_operator_of_onnx_runtime(tmp_path: Path) -> None:
    inputs = ["x", "at", "cos", "sin"]
    made = node("RotaryEmbedding", inputs, domain=MICROSOFT, scale=2.0)
    tables = {"cos": np.ones((8, 2), np.float32), "sin": np.ones((8, 2), np.float32)}
    given = {"x": (np.float32, [1, 3, 4]), "at": (np.int64, [1, 3])}
    with pytest.raises(Problem) as caught:
        read_onnx(save(tmp_path / "a.onnx", [made], given, tables))
    assert "`scale` of 2.0" in caught.value.why


def test_one_that_stands_at_what_is_built(tmp_path: Path) -> None:
    made = node("LayerNormalization", ["x", "w"], stash_type=1)
    path = save(tmp_path / "a.onnx", [made], X, {"w": np.ones(4, np.float32)})
    assert read_onnx(path)(torch.randn(2, 4))["y"].shape == (2, 4)


def test_attributes_of_the_standard_are_told_apart() -> None:
    """Each that the standard names is read, or may stand at its default."""
    from attnopt.compiler.onnx.table import _TABLE, plain

    for (domain, name), entry in _TABLE.items():
        if domain or not onnx.defs.has(name):
            continue
        for attribute, told in onnx.defs.get_schema(name, 24).attributes.items():
            if attribute in entry.reads or name == "Constant":
                continue
            value = plain(onnx.helper.get_attribute_value(told.default_value))
            assert entry.only[attribute] == value, f"{name}: {attribute}"
    assert names()
