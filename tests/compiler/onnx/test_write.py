"""Specs as the operator Attention, run in ONNX Runtime: masks, windows, groups, caps and sinks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.attend import reference
from attnopt.compiler.errors import Problem
from attnopt.compiler.onnx import read_onnx
from attnopt.compiler.onnx.write import write_onnx
from attnopt.compiler.ops import ATTENTION
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask
from tests.decoder import decoder
from tests.onnx_files import answers, assert_as_runtime, onnx

pytest.importorskip("onnxscript")
BASE = AttentionSpec(4, 2, head_dim=8, v_dim=8, scale=0.3, mask=CAUSAL)
SPECS = {
    "causal": BASE,
    "full, wide values": BASE.with_(mask=FULL, v_dim=16),
    "window": BASE.with_(mask=Mask("window", left=3)),
    "window with sinks": BASE.with_(mask=Mask("window", left=3, sink=2)),
    "two-sided window": BASE.with_(mask=Mask("window", left=2, causal=False)),
    "soft cap": BASE.with_(softcap=0.5),
    "padding": BASE.with_(extras=("padding",)),
    "padding, lowest": BASE.with_(extras=("padding",), fill="min"),
    "bias": BASE.with_(extras=("bias",)),
    "keep and bias": BASE.with_(mask=FULL, extras=("bias", "keep")),
    "sinks": BASE.with_(extras=("sinks",)),
    "chunks": BASE.with_(mask=Mask("window", left=3), backend="chunked"),
    "one key/value head": BASE.with_(kv_heads=1, backend="sdpa"),
}


class _Attention(nn.Module):
    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.line = spec.text

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, e0: Tensor | None = None, e1: Tensor | None = None
    ) -> Tensor:
        extras = [extra for extra in (e0, e1) if extra is not None]
        made: Tensor = ATTENTION(q, k, v, extras, self.line)
        return made


def _inputs(spec: AttentionSpec, batch: int, length: int) -> dict[str, Tensor]:
    made = {
        "q": torch.randn(batch, spec.heads, length, spec.head_dim),
        "k": torch.randn(batch, spec.kv_heads, length, spec.head_dim),
        "v": torch.randn(batch, spec.kv_heads, length, spec.v_dim),
    }
    padding = torch.ones(batch, length, dtype=torch.bool)
    padding[0, :2] = False  # under a causal mask, rows that read nothing
    known = {
        "padding": padding,
        "bias": torch.randn(1, spec.heads, length, length),
        "keep": torch.rand(batch, 1, length, length) > 0.3,
        "sinks": torch.randn(1, spec.heads, 1, 1),
    }
    return made | {f"e{i}": known[name] for i, name in enumerate(spec.extras)}


def _program(spec: AttentionSpec) -> Program:
    inputs = _inputs(spec, 2, 7)
    auto = torch.export.Dim.AUTO
    open_dims = {"sinks": (), "bias": (2, 3), "keep": (0, 2, 3), "padding": (0, 1)}
    kinds = {f"e{i}": name for i, name in enumerate(spec.extras)}
    shapes = {
        name: dict.fromkeys(open_dims.get(kinds.get(name, name), (0, 2)), auto) for name in inputs
    }
    exported = torch.export.export(
        _Attention(spec), (), inputs, dynamic_shapes=shapes, strict=False
    )
    made = exported.module(check_guards=False)
    dynamic = {name: dict.fromkeys(dims, "s") for name, dims in shapes.items()}
    assert isinstance(made, torch.fx.GraphModule)
    return Program(made, Batch((), inputs), name="one attention", dynamic=dynamic)


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_becomes_one_node(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    written = write_onnx(_program(spec), tmp_path / "a.onnx")
    assert written.attentions == 1 and not written.spelled
    assert written.error is not None and written.error < 1e-5
    model = onnx.load(tmp_path / "a.onnx")
    assert not any(node.op_type == "Softmax" for node in model.graph.node)
    inputs = _inputs(spec, 3, 12)
    (found,) = answers(tmp_path / "a.onnx", inputs)
    extras = [inputs[f"e{i}"] for i in range(len(spec.extras))]
    assert_as_runtime(found, reference(inputs["q"], inputs["k"], inputs["v"], extras, spec))


def test_a_causal_mask_is_a_flag_and_groups_stay_groups(tmp_path: Path) -> None:
    write_onnx(_program(BASE), tmp_path / "a.onnx", opset=24)
    model = onnx.load(tmp_path / "a.onnx")
    (made,) = (node for node in model.graph.node if node.op_type == "Attention")
    known = {a.name: onnx.helper.get_attribute_value(a) for a in made.attribute}
    assert known["is_causal"] == 1 and known["scale"] == pytest.approx(0.3)
    assert len([name for name in made.input if name]) == 3
    assert {i.domain: i.version for i in model.opset_import}[""] == 24
    assert not any(node.op_type in ("Expand", "Tile") for node in model.graph.node)


def test_an_opset_without_the_operator(tmp_path: Path) -> None:
    with pytest.raises(Problem) as caught:
        write_onnx(_program(BASE), tmp_path / "a.onnx", opset=20)
    assert caught.value.code == "A517" and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Problem) as caught:
        write_onnx(_program(BASE), tmp_path / "file" / "a.onnx")
    assert caught.value.code == "A519"


def test_a_wrong_answer_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.compiler.onnx import write

    monkeypatch.setattr(write, "_apart", lambda found, wanted: 0.5)
    (tmp_path / "a.onnx").write_bytes(b"as it was")
    with pytest.raises(Problem) as caught:
        write_onnx(_program(BASE), tmp_path / "a.onnx")
    assert caught.value.code == "A520"
    assert (tmp_path / "a.onnx").read_bytes() == b"as it was" and len(list(tmp_path.iterdir())) == 1


def _weights(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix == ".data")


def test_many_weights_lie_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.compiler.onnx import write

    monkeypatch.setattr(write, "_INLINE", 0)
    written = write_onnx(decoder().copy(), tmp_path / "a.onnx")
    assert written.attentions == 2
    (data,) = _weights(tmp_path)
    assert re.fullmatch(r"a\.onnx\.[0-9a-f]{16}\.data", data)
    assert len(list(tmp_path.iterdir())) == 2
    assert read_onnx(tmp_path / "a.onnx").graph.opset == 23


def _other() -> Program:
    program = decoder().copy()
    program.set_weight("head.weight", 2 * program.weight("head.weight"))
    return program


def test_a_model_keeps_its_weights_where_the_next_one_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnopt.compiler.onnx import write

    monkeypatch.setattr(write, "_INLINE", 0)
    path = tmp_path / "a.onnx"
    write_onnx(decoder().copy(), path)
    ids = {"input_ids": decoder().example.kwargs["input_ids"]}
    before, move = answers(path, ids)[0], os.replace

    def cut_off(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise OSError("no more")
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(write.os, "replace", cut_off)
        with pytest.raises(Problem):
            write_onnx(_other(), path)
    assert torch.equal(answers(path, ids)[0], before)
    write_onnx(_other(), path)
    assert torch.allclose(answers(path, ids)[0], 2 * before, rtol=1e-4, atol=1e-4)
    assert len(_weights(tmp_path)) == 1


def test_weights_that_another_model_reads_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attnopt.compiler.onnx import write

    monkeypatch.setattr(write, "_INLINE", 0)
    write_onnx(decoder().copy(), tmp_path / "a.onnx")
    (tmp_path / "copy.onnx").write_bytes((tmp_path / "a.onnx").read_bytes())
    (tmp_path / "a.onnx.data").touch()
    write_onnx(_other(), tmp_path / "a.onnx")
    assert len(_weights(tmp_path)) == 2
    read_onnx(tmp_path / "copy.onnx")
    assert "a.onnx.data" not in _weights(tmp_path)
