"""A pickle that runs a command is refused by the command's name, wherever it hides, and not run."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import load
from tests.compiler.intake.conftest import Command

DICT_CONTEXT = rb"\"builtins.dict\", \"context\": \"[]\""


def refused(source: Path, **options: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        load(str(source), **options)
    return caught.value


def assert_named(problem: Problem, marker: Path, code: str = "A102") -> None:
    assert problem.code == code
    assert "os.system" in str(problem) and "any command" in problem.why
    assert not marker.exists()


def test_the_bait_works(command: Command, marker: Path) -> None:
    pickle.loads(pickle.dumps(command))
    assert marker.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("hidden", ["bare", "list", "module", "state"])
def test_command_in_a_checkpoint(
    tmp_path: Path, command: Command, marker: Path, hidden: str, legacy: bool
) -> None:
    module = nn.Linear(4, 4)
    module.note = {"deep": [(1, command)]}  # type: ignore[assignment]
    values = {
        "bare": command,
        "list": [1, [2, command]],
        "module": module,
        "state": {"weight": torch.ones(2), "optimizer": {"x": command}},
    }
    path = tmp_path / "model.pt"
    torch.save(values[hidden], path, _use_new_zipfile_serialization=not legacy)
    assert_named(refused(path), marker)


def test_command_through_stack_global(tmp_path: Path, command: Command, marker: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": command}, path, pickle_protocol=4)
    assert_named(refused(path), marker)


def test_command_in_a_plain_pickle(tmp_path: Path, command: Command, marker: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(command))
    assert_named(refused(path), marker, "A106")
    assert_named(refused(path, trust=True), marker, "A106")


def test_command_in_inputs(linear: Path, tmp_path: Path, command: Command, marker: Path) -> None:
    torch.save((torch.ones(2, 4), command), tmp_path / "bad.pt")
    assert_named(refused(linear, inputs=tmp_path / "bad.pt"), marker)


def rewritten(source: Path, target: Path, entries: dict[str, bytes], new_root: str = "") -> Path:
    """A copy of a zip with some entries replaced or added, by their names below the root folder."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            short = name.removeprefix(f"{root}/")
            new.writestr(f"{new_root or root}/{short}", entries.pop(short, old.read(name)))
        for short, data in entries.items():
            new.writestr(f"{new_root or root}/{short}", data)
    return target


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_command_in_sample_inputs_of_an_export(
    exported: Path, tmp_path: Path, command: Command, marker: Path
) -> None:
    entries = {"data/sample_inputs/model.pt": saved(((torch.ones(2, 4), command), {}))}
    assert_named(refused(rewritten(exported, tmp_path / "bad.pt2", entries)), marker)


@pytest.mark.parametrize("style", ["zip", "legacy"])
def test_command_in_pickled_weights_of_an_export(
    exported: Path, tmp_path: Path, command: Command, marker: Path, style: str
) -> None:
    with zipfile.ZipFile(exported) as archive:
        name = next(n for n in archive.namelist() if n.endswith("model_weights_config.json"))
        config = archive.read(name).replace(b'"use_pickle": false', b'"use_pickle": true')
    stream = io.BytesIO()
    torch.save(command, stream, _use_new_zipfile_serialization=style == "zip")
    entries = {
        "data/weights/model_weights_config.json": config,
        "data/weights/weight_0": stream.getvalue(),
        "data/weights/weight_1": stream.getvalue(),
    }
    assert_named(refused(rewritten(exported, tmp_path / "bad.pt2", entries)), marker)


def test_command_in_an_opaque_constant_of_an_export(
    exported: Path, tmp_path: Path, command: Command, marker: Path
) -> None:
    entries = {"data/constants/opaque_obj_0": pickle.dumps(command)}
    assert_named(refused(rewritten(exported, tmp_path / "bad.pt2", entries)), marker)


def test_command_in_weights_of_a_nested_name(
    exported: Path, tmp_path: Path, command: Command, marker: Path
) -> None:
    payload = {"path_name": "deep/er", "is_param": True, "use_pickle": True, "tensor_meta": None}
    entries = {
        "data/weights/model_weights_config.json": json.dumps({"config": {"w": payload}}).encode(),
        "data/weights/deep/er": saved(command),
    }
    problem = refused(rewritten(exported, tmp_path / "bad.pt2", entries))
    assert problem.code == "A104" and "deep/er" in problem.what and not marker.exists()


def test_a_second_model_without_the_usual_suffix_is_looked_through(
    exported: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(exported) as archive:
        name = next(n for n in archive.namelist() if n.endswith("models/model.json"))
        document = archive.read(name)
    planted = document.replace(b"torch.ops.aten.linear.default", b"torch.os.system")
    for root in ("", "extra"):
        entries = {"models/other.jsno": planted}
        path = rewritten(exported, tmp_path / f"bad{root}.pt2", entries, root)
        assert "torch.os.system" in refused(path).what


def test_objects_of_compiled_classes_in_an_export(exported: Path, tmp_path: Path) -> None:
    entries = {"data/constants/custom_obj_0": b"PK"}
    assert "custom_obj_0" in refused(rewritten(exported, tmp_path / "bad.pt2", entries)).what


def test_command_in_the_older_export_layout(tmp_path: Path, command: Command, marker: Path) -> None:
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", saved({"weight": command}))
    assert_named(refused(path), marker)


def test_compiled_code_in_an_export(exported: Path, tmp_path: Path) -> None:
    entries = {"data/aotinductor/model/kernel.so": b"\x7fELF"}
    problem = refused(rewritten(exported, tmp_path / "bad.pt2", entries))
    assert problem.code == "A102" and "kernel.so" in problem.what


@pytest.mark.parametrize(
    ("written", "planted", "code"),
    [
        (b"torch.ops.aten.linear.default", b"torch.os.system", "A102"),
        (b"torch.ops.aten.linear.default", b"_operator.methodcaller", "A102"),
        (b"torch.ops.aten.linear.default", b"torch.ops.load_library", "A102"),
        (b"torch.ops.aten.linear.default", b"torch.ops.aten.from_file.default", "A102"),
        (b"Symbol('", b"__import__('os').system('touch it-was-run'), Symbol('", "A104"),
        (b'"guards_code": []', b"\"guards_code\": [\"__import__('os').system('true')\"]", "A104"),
        (b'["input"]', b'["x=__import__(\\"os\\")"]', "A104"),
        (DICT_CONTEXT, DICT_CONTEXT.replace(b"[]", rb"{\\\"__enum__\\\": 1}"), "A104"),
        (DICT_CONTEXT, DICT_CONTEXT.replace(b"[]", rb"{\\\"__enu\\\u006d__\\\": 1}"), "A104"),
        (DICT_CONTEXT, DICT_CONTEXT.replace(b"[]", rb"[\\\"x'] + f()\\\"]"), "A104"),
    ],
)
def test_code_in_the_description_of_an_export(
    exported: Path, tmp_path: Path, written: bytes, planted: bytes, code: str
) -> None:
    with zipfile.ZipFile(exported) as archive:
        name = next(n for n in archive.namelist() if n.endswith("models/model.json"))
        document = archive.read(name)
    assert written in document
    entries = {"models/model.json": document.replace(written, planted)}
    problem = refused(rewritten(exported, tmp_path / "bad.pt2", entries))
    assert problem.code == code
    assert not (tmp_path / "it-was-run").exists() and not os.path.exists("it-was-run")


def test_a_plain_copy_of_the_export_still_loads(exported: Path, tmp_path: Path) -> None:
    assert load(str(rewritten(exported, tmp_path / "copy.pt2", {}))).exported is not None
