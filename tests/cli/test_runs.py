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
def test_a_plan_on_another_model_is_checked_as_that_model(
    command: Command, finished: Path, tmp_path: Path
) -> None:
    other = encoder()
    torch.nn.init.normal_(next(other.parameters()))
    torch.save(other, tmp_path / "other.pt")
    words = ["apply", finished / "out", "other.pt", "--out", "new"]
    ended = command("attnopt", *words, "--inputs", finished / "inputs.pt")
    assert ended.code == 0 and "not measured on this model" in " ".join(ended.out.split()), ended
    told = command("attnopt", "check", "new", "--min-speed", "0.01x", "--json")
    assert told.code == 0 and told.json["drop"] is not None, told


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
    import attnopt.autotune.check

    class Stop(Exception):
        pass

    asked: dict[str, Any] = {}

    def check(folder: Path, model: str, **given: Any) -> None:
        asked.update(given, model=model)
        raise Stop

    monkeypatch.setattr(attnopt.autotune.check, "check", check)
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
    assert (asked["inputs"], asked["length"], asked["dtype"]) == (inputs, 7, "float64")


def test_check_takes_data_over_option_by_option(
    command: Command, monkeypatch: Any, tmp_path: Path
) -> None:
    model, inputs = save_encoder(tmp_path)
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("words"), other.write_text("more words")
    words = ["optimize", str(model), "--text", str(text), "--batch", "4", "--length", "9"]
    folder = _report(tmp_path / "run", shlex.join([*words, "--calibration", str(other)]))

    def data(*argv: object) -> list[Any]:
        asked = _asked(command, monkeypatch, folder, *argv)
        return [asked[key] for key in ("text", "calibration", "inputs", "batch", "length")]

    assert data() == [text, other, None, 4, 9]
    assert data("--batch", "2") == [text, other, None, 2, 9]
    assert data("--text", other) == [other, other, None, 4, 9]
    assert data("--inputs", inputs) == [None, None, inputs, None, None]
    tensors = shlex.join(["attnopt", "optimize", str(model), "--inputs", str(inputs)])
    folder = _report(tmp_path / "tensors", tensors)
    assert data("--text", text) == [text, None, None, None, None]
    folder = _report(
        tmp_path / "applied", "attnopt apply out encoder.pt --inputs inputs.pt --out o"
    )
    assert data() == [None, None, Path("inputs.pt"), None, None]


def test_recorded_data_that_is_not_here(command: Command, monkeypatch: Any, tmp_path: Path) -> None:
    model, inputs = save_encoder(tmp_path)
    folder = _report(tmp_path / "run", f"optimize {model} --text gone/some.txt --batch 4")
    ended = command("attnopt", "check", folder, "--json")
    assert ended.code == 1 and ended.error["code"] == "A613"
    assert ended.error["where"] == "gone/some.txt" and str(tmp_path) in ended.error["why"]
    assert _asked(command, monkeypatch, folder, "--inputs", inputs)["text"] is None


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_report_is_told(command: Command, tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report.json").write_text(content)
    ended = command("attnopt", "check", tmp_path / "run", "--json")
    assert ended.code == 1 and ended.error["code"] == "A505"
    assert ended.error["where"].endswith("report.json")


@pytest.mark.parametrize(("option", "value"), [("--min-speed", "0x"), ("--max-drop", "-1%")])
def test_bounds_that_mean_nothing(
    command: Command, tmp_path: Path, option: str, value: str
) -> None:
    folder = _report(tmp_path / "run", "")
    ended = command("attnopt", "check", folder, "model.pt", f"{option}={value}", "--json")
    assert ended.code == 1 and ended.error["code"] == "A410" and option in ended.error["what"]


@pytest.mark.parametrize(
    "recorded", ["optimize os:getcwd --trust", "attnopt optimize gone.pt", "optimize", "", "'"]
)
def test_code_named_in_a_report_is_never_run(
    command: Command, tmp_path: Path, recorded: str
) -> None:
    ended = command("attnopt", "check", _report(tmp_path / "run", recorded), "--json")
    assert ended.code == 1 and ended.error["code"] == "A612" and "MODEL" in ended.error["help"]
