"""Files that must be refused, each with a message that says what is wrong and what to do."""

from __future__ import annotations

import pickle
import random
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import load


def refused(source: Path | str, **options: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        load(str(source), **options)
    return caught.value


def test_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "model.pt").code == "A101"


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "model.pt").touch()
    assert refused(tmp_path / "model.pt").code == "A103"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_truncated_archive(linear: Path, share: float) -> None:
    data = linear.read_bytes()
    linear.write_bytes(data[: int(len(data) * share)])
    problem = refused(linear)
    assert problem.code == "A103" and "cut short" in problem.what


def test_truncated_export(exported: Path) -> None:
    exported.write_bytes(exported.read_bytes()[:-100])
    assert refused(exported).code == "A103"


def test_flipped_bytes_in_the_pickle(linear: Path) -> None:
    data = bytearray(linear.read_bytes())
    at = data.index(b"torch.nn.modules.linear")
    data[at : at + 5] = b"TORCH"
    linear.write_bytes(bytes(data))
    problem = refused(linear)
    assert problem.code == "A103" and "data.pkl" in problem.what


def test_zip_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("bomb/data/0", bytes(64 << 20))
    assert path.stat().st_size < 1 << 20
    problem = refused(path)
    assert problem.code == "A104" and "zip bomb" in problem.why


def test_zip_bomb_of_overlapping_entries(tmp_path: Path) -> None:
    path = tmp_path / "overlap.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("m/data/0", random.randbytes(4096))
        archive.writestr("m/data/1", b"x")
    data = bytearray(path.read_bytes())
    first = struct.unpack("<I", data[data.index(b"PK\x01\x02") + 42 :][:4])[0]
    last = data.rindex(b"PK\x01\x02")
    data[last + 42 : last + 46] = struct.pack("<I", first)
    path.write_bytes(bytes(data))
    assert "overlaps" in refused(path).why


def test_duplicate_names(tmp_path: Path) -> None:
    path = tmp_path / "twice.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}, protocol=2))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("m/data.pkl", pickle.dumps({}, protocol=2))
    assert "share the name" in refused(path).why


def test_bytes_behind_the_directory(linear: Path) -> None:
    with zipfile.ZipFile(linear, "a") as archive:
        archive.comment = b"a second directory could hide here"
    assert "extended" in refused(linear).why


def test_a_zip_that_is_not_from_torch(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("readme", "hello")
    assert refused(tmp_path / "model.pt").code == "A106"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(4, 4), torch.ones(2, 4)), path)
    problem = refused(path)
    assert "TorchScript" in problem.what and "torch.save(model" in problem.help


@pytest.mark.parametrize("wrapped", [False, True])
def test_bare_state_dict(tmp_path: Path, wrapped: bool) -> None:
    weights: Any = nn.Linear(4, 4).state_dict()
    torch.save({"epoch": 3, "model": weights} if wrapped else weights, tmp_path / "weights.pt")
    problem = refused(tmp_path / "weights.pt")
    assert "state dict" in problem.what and "module.path:function" in problem.help


def test_a_tensor_is_no_model(inputs: Path) -> None:
    assert "Tensor, not a module" in refused(inputs).what


def test_safetensors_alone(tmp_path: Path) -> None:
    save_file(nn.Linear(4, 4).state_dict(), tmp_path / "model.pt")
    problem = refused(tmp_path / "model.pt")
    assert "safetensors" in problem.what and "config.json" in problem.help


def test_noise_is_named_as_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"hello, world")
    assert refused(tmp_path / "model.pt").code == "A106"


def test_nan_weights_are_named(tmp_path: Path, inputs: Path) -> None:
    last = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), last)
    with torch.no_grad():
        last.weight[2, 3] = float("nan")
    torch.save(model, tmp_path / "model.pt")
    problem = refused(tmp_path / "model.pt", inputs=inputs)
    assert problem.code == "A108" and "1.weight" in problem.what and "0.weight" not in problem.what


def test_nan_weights_of_an_exported_program(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    nn.init.constant_(model.bias, float("nan"))
    torch.export.save(torch.export.export(model, (torch.ones(2, 4),)), tmp_path / "model.pt2")
    assert "bias" in refused(tmp_path / "model.pt2").what


def test_infinite_buffers_are_fine(tmp_path: Path, inputs: Path) -> None:
    # Masks of -inf are how attention is switched off; only NaN is never meant.
    model = nn.Linear(4, 4)
    model.register_buffer("mask", torch.full((4,), -torch.inf))
    torch.save(model, tmp_path / "model.pt")
    assert load(str(tmp_path / "model.pt"), inputs=inputs).module is not None


def test_wrong_shapes(linear: Path, tmp_path: Path) -> None:
    torch.save(torch.ones(2, 5), tmp_path / "wrong.pt")
    problem = refused(linear, inputs=tmp_path / "wrong.pt")
    assert problem.code == "A109" and "float32 [2, 5]" in problem.what and "2x5" in problem.why


def test_wrong_shapes_of_an_exported_program(exported: Path, tmp_path: Path) -> None:
    torch.save(torch.ones(2, 5), tmp_path / "wrong.pt")
    problem = refused(exported, inputs=tmp_path / "wrong.pt")
    assert problem.code == "A109" and "[2, 5]" in problem.what


def test_no_inputs_for_a_model_without_a_config(linear: Path) -> None:
    problem = refused(linear)
    assert problem.code == "A111" and "--inputs" in problem.help


def test_a_module_that_returns_no_tensor(stranger: Path, tmp_path: Path, inputs: Path) -> None:
    (tmp_path / "silent.py").write_text(
        "from torch import nn\nclass Silent(nn.Module):\n    def forward(self, x): return 3\n"
    )
    assert "returns no tensor" in refused("silent:Silent", inputs=inputs).what


def test_crc_error_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    payload = pickle.dumps({"key": "value"}, protocol=2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", payload)
    data = path.read_bytes()
    crc = struct.pack("<I", zlib.crc32(payload))
    path.write_bytes(data.replace(crc, b"\0\0\0\0"))
    assert refused(path).code == "A103"
