"""A run from one end to the other: optimize, check what came out, apply its plan."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnopt
from attnopt.cli.main import optimizer, run
from tests.cli.conftest import LENGTH, ROWS, WIDTH, Command, encoder, save_encoder
from tests.tolerance import assert_close


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, its inputs and the finished run `out`."""
    folder = tmp_path_factory.mktemp("run")
    before = Path.cwd()
    model, inputs = save_encoder(folder)
    os.chdir(folder)
    demands = ["--budget", "0.01x", "--max-drop", "0", "--out", "out"]
    try:
        assert run(optimizer, "optimize", [str(model), "--inputs", str(inputs), *demands]) == 0
    finally:
        os.chdir(before)
    yield folder


@pytest.mark.slow
def test_the_folder(finished: Path) -> None:
    out = finished / "out"
    made = {path.name for path in out.iterdir()}
    assert made == {"model.pt2", "plan.json", "report.json", "report.md", "report.html", ".work"}
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["met"] and report["accuracy"]["tier"] == "exact"
    assert shlex.split(report["command"])[0] == "optimize"
    x = torch.randn(ROWS, LENGTH, WIDTH)
    with torch.no_grad():
        expected = encoder()(x)
    assert_close(attnopt.load(out)(x), expected)
    assert_close(torch.export.load(out / "model.pt2").module()(x), expected)


@pytest.mark.slow
def test_apply_rebuilds_the_same_model(command: Command, finished: Path, tmp_path: Path) -> None:
    words = ["apply", finished / "out", finished / "encoder.pt", "--out", tmp_path / "again"]
    told = command("attnopt", *words, "--inputs", finished / "inputs.pt", "--json")
    assert told.code == 0, told
    assert any(outcome["applied"] for outcome in told.json["outcomes"])
    first, second = attnopt.load(finished / "out"), attnopt.load(tmp_path / "again")
    x = torch.randn(ROWS, LENGTH, WIDTH)
    assert_close(second(x), first(x))
    assert second.plan.steps == first.plan.steps


@pytest.mark.slow
def test_check_takes_the_model_and_the_data_of_the_run(command: Command, finished: Path) -> None:
    told = command("attnopt", "check", finished / "out", "--json")
    assert told.code == 0 and told.json["ok"], told
    assert told.json["drop"] is not None and told.json["evidence"] == "measured"


@pytest.mark.slow
def test_check_fails_out_of_bounds(command: Command, finished: Path) -> None:
    ended = command("attnopt", "check", finished / "out", "--min-speed", "1000x")
    assert ended.code == 2 and "too slow" in ended.out and "out of bounds" in ended.out


def _report(folder: Path, recorded: str) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"command": recorded}))
    return folder


def _asked(command: Command, monkeypatch: Any, *argv: object) -> dict[str, Any]:
    """What `check` would measure."""
    import attnopt.autotune.replay

    class Stop(Exception):
        pass

    asked: dict[str, Any] = {}

    def check(folder: Path, model: str, **given: Any) -> None:
        asked.update(given, model=model)
        raise Stop

    monkeypatch.setattr(attnopt.autotune.replay, "check", check)
    with pytest.raises(Stop):
        command("attnopt", "check", *argv)
    return asked


def test_what_check_takes_over_from_a_report(
    command: Command, monkeypatch: Any, tmp_path: Path
) -> None:
    model, inputs = save_encoder(tmp_path)
    recorded = ["optimize", "--trust", "--allow-global", "os.system", "--batch", "4", str(model)]
    recorded += ["--dtype", "float64", "--attention", "eager"]
    folder = _report(tmp_path / "run", shlex.join([*recorded, "--inputs", str(inputs)]))
    asked = _asked(command, monkeypatch, folder)
    assert (asked["model"], asked["inputs"], asked["batch"]) == (str(model), inputs, 4)
    assert asked["trust"] is False and asked["allow_globals"] == ()
    assert (asked["dtype"], asked["attention"]) == ("float64", "eager")
    asked = _asked(command, monkeypatch, folder, "other.pt", "--length", "7", "--trust")
    assert asked["model"] == "other.pt" and asked["trust"] is True
    assert (asked["inputs"], asked["length"], asked["dtype"]) == (None, 7, "float64")


@pytest.mark.parametrize(
    "recorded", ["optimize os:getcwd --trust", "attnopt optimize gone.pt", "optimize", "", "'"]
)
def test_code_named_in_a_report_is_never_run(
    command: Command, tmp_path: Path, recorded: str
) -> None:
    ended = command("attnopt", "check", _report(tmp_path / "run", recorded), "--json")
    assert ended.code == 1 and ended.error["code"] == "A612" and "MODEL" in ended.error["help"]
