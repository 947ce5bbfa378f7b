"""An ONNX file in, an ONNX file out, over the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.conftest import Command
from tests.onnx_files import answers, assert_as_runtime, decoder, node, save

ROW = {"raised": True, "heads": 4, "mask": "window(left=4)", "position": "none", "missing": {}}


def test_inspect(command: Command, tmp_path: Path) -> None:
    path = decoder(tmp_path / "model.onnx", window=4)
    found = command("attnopt", "inspect", path, "--no-time", "--length", 9, "--json").json
    assert found["found"] == found["raised"] == 2
    for row in found["sites"]:
        assert {key: row[key] for key in ROW} == ROW
        assert row["module"].startswith("layers.") and row["source"] == ""
    assert [part["kind"] for part in found["sublayers"]] == ["attention", "mlp"] * 2


def test_a_graph_without_attention(command: Command, tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", [node("Relu", ["x"])], {"x": (np.float32, ["b", 4])})
    ended = command("attnopt", "inspect", path, "--json")
    assert ended.code == 3


def test_an_operator_that_is_not_read(command: Command, tmp_path: Path) -> None:
    nodes = [node("Bernoulli", ["x"], name="/draw")]
    path = save(tmp_path / "a.onnx", nodes, {"x": (np.float32, ["b", 4])})
    for words in (("attnopt", "inspect", path), ("optimize", path)):
        ended = command(*words, "--json")
        assert ended.code == 1 and ended.error["code"] == "A126"
        assert "/draw (Bernoulli)" in ended.error["why"]


def test_export_needs_a_run(command: Command, tmp_path: Path) -> None:
    ended = command("attnopt", "export", tmp_path / "none", "--onnx", "a.onnx", "--json")
    assert ended.code == 1 and ended.error["code"] == "A505"


@pytest.mark.slow
def test_optimize_and_export(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    path = decoder(tmp_path / "model.onnx", window=4)
    ended = command(
        "optimize", path, "--max-drop", 0, "--effort", "none", "--length", 24, "--out", "out",
        "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    applied = {o["rewrite"] for o in ended.json["outcomes"] if o["applied"]}
    assert {"fold_repeated_kv{}", "fuse_attention{}"} <= applied
    told = command("attnopt", "export", "out", "--onnx", "sub/fast.onnx", "--json").json
    assert told["attentions"] == 2 and told["spelled"] == [] and told["error"] < 1e-4
    for shape in ((2, 24), (3, 7), (1, 30)):
        tokens = {"input_ids": torch.randint(0, 40, shape)}
        (found,), (wanted,) = answers(tmp_path / "sub/fast.onnx", tokens), answers(path, tokens)
        assert_as_runtime(found, wanted)
    again = command("attnopt", "inspect", "sub/fast.onnx", "--no-time", "--json").json
    facts = {(row["heads"], row["kv_heads"], row["mask"]) for row in again["sites"]}
    assert facts == {(4, 2, "window(left=4)")}
    plain = command("attnopt", "export", "out/plan.json", "--onnx", "b.onnx", "--opset", 24)
    assert plain.code == 0 and "2 Attention nodes of opset 24" in plain.out
    assert command("attnopt", "export", "out", "--onnx", "c.onnx", "--opset", 20).code == 1
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["steps"]
