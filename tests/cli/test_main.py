"""The console scripts: help, versions, mistakes in the command line, and what goes to stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnopt import __version__
from attnopt.autotune.request import HealBudget
from tests.autotune.results import full, least
from tests.cli.conftest import Command, save_encoder

SHOUTING = """
import torch
from torch import nn

class Loud(nn.Module):
    def forward(self, x):
        print("a line that the model's own code prints")
        return nn.functional.scaled_dot_product_attention(x, x, x)

def build():
    print("building")
    return Loud(), torch.randn(2, 2, 5, 4)

def broken():
    raise LookupError("from the user's own code")
"""


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        ("optimize", ["--help"], "--budget"),
        ("attnopt", [], "inspect"),
        ("attnopt", ["optimize", "--help"], "--budget"),
        ("attnopt", ["inspect", "--help"], "--no-time"),
        ("attnopt", ["apply", "--help"], "PLAN"),
        ("attnopt", ["check", "--help"], "--min-speed"),
        ("attnopt", ["--version"], __version__),
        ("optimize", ["--version"], __version__),
    ],
)
def test_help_and_version(command: Command, name: str, argv: list[str], said: str) -> None:
    ended = command(name, *argv)
    assert ended.code == 0 and said in ended.out


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        ("optimize", ["m", "--bugdet", "2x"], "--bugdet"),
        ("optimize", [], None),
        ("optimize", ["m", "--text", "missing.txt"], "missing.txt"),
        ("optimize", ["m", "--batch", "0"], "--batch"),
        ("optimize", ["m", "--heal-rank", "8"], "--heal-rank needs --heal"),
        ("attnopt", ["apply", "plan.json"], "MODEL"),
        ("attnopt", ["mistake"], "mistake"),
    ],
)
def test_mistakes_are_problems(
    command: Command, name: str, argv: list[str], said: str | None
) -> None:
    if said is None:
        assert "Usage" in command(name, *argv).out
        return
    plain = command(name, *argv)
    assert plain.code == 1 and plain.out == ""
    assert "error[A610]" in plain.err and said in plain.err and "--help" in plain.err
    told = command(name, *argv, "--json")
    assert told.code == 1
    assert told.error["code"] == "A610" and said in told.error["what"]


def _without_torch(argv: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from attnopt.cli.main import optimizer, run; "
        f"code = run(optimizer, 'optimize', {argv!r}); "
        "heavy = {'torch', 'optuna', 'transformers', 'plotly', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=folder
    )


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["m.pt", "--budget", "-1"], 1),
        (["m.pt", "--target", "abacus"], 1),
        (["m.pt", "--nonsense"], 1),
        (["m.pt", "--out", "/dev/null/out"], 1),
    ],
)
def test_help_and_mistakes_do_without_torch(argv: list[str], code: int, tmp_path: Path) -> None:
    ended = _without_torch(argv, tmp_path)
    assert ended.returncode == code, ended.stderr


def test_what_the_model_prints_stays_off_the_document(command: Command, tmp_path: Path) -> None:
    (tmp_path / "loud_model.py").write_text(SHOUTING)
    ended = command("attnopt", "inspect", "loud_model:build", "--no-time", "--json")
    assert ended.json["found"] == 1
    assert "building" in ended.err and "own code prints" in ended.err


def test_a_bug_keeps_its_traceback(command: Command, tmp_path: Path) -> None:
    (tmp_path / "buggy_model.py").write_text(SHOUTING)
    with pytest.raises(LookupError, match="the user's own code"):
        command("attnopt", "inspect", "buggy_model:broken", "--json")


def _stub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[dict[str, Any]]:
    """Replace the optimization by an answer; returns what it is asked for."""
    import attnopt.autotune.optimize

    asked: list[dict[str, Any]] = []

    def optimize(model: str, **given: Any) -> Any:
        asked.append({"model": model, **given})
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(attnopt.autotune.optimize, "optimize", optimize)
    return asked


def test_every_option_arrives(command: Command, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the folder of the metric is added to it
    asked = _stub(monkeypatch, least())
    text = tmp_path / "a text.txt"
    text.write_text("words")
    (tmp_path / "mine.py").write_text("def score(model):\n    return 1.0\n")
    ended = command(
        "optimize", "m.pt", "--target", "a100", "--budget", "150%", "--max-drop", "0.5%",
        "--effort", "full", "--trials", "7", "--timeout", "1.5m", "--out", "there", "--seed", "3",
        "--resume", "--metric", "mine:score", "--text", text, "--calibration", text,
        "--inputs", text, "--batch", "8", "--length", "64", "--allow-global", "a.B",
        "--allow-global", "c.D", "--trust", "--attention", "eager", "--dtype", "float32",
        "--heal", "200ktok", "--heal-rank", "8", "--device", "cpu",
    )  # fmt: skip
    assert ended.code == 0
    given = asked[0]
    del given["progress"], given["command"]
    assert given == {
        "model": "m.pt", "target": "a100", "budget": 1.5, "max_drop": 0.005, "effort": "full",
        "trials": 7, "timeout": 90.0, "out": Path("there"), "seed": 3, "resume": True,
        "metric": "mine:score", "text": text, "calibration": text, "inputs": text, "batch": 8,
        "length": 64, "allow_globals": ("a.B", "c.D"), "trust": True, "attention": "eager",
        "dtype": "float32", "heal": HealBudget(tokens=200_000, rank=8), "kv_bytes": None,
        "device": "cpu",
    }  # fmt: skip
    assert command("optimize", "m.pt", "--kv-bytes", "50%").code == 0
    assert asked[1]["kv_bytes"] == 0.5


@pytest.mark.parametrize("metric", ["nowhere:score", "mine", "math:pi"])
def test_a_metric_that_is_none(command: Command, monkeypatch: Any, metric: str) -> None:
    asked = _stub(monkeypatch, least())
    ended = command("optimize", "m.pt", "--metric", metric, "--json")
    assert ended.code == 1 and ended.error["code"] == "A407" and not asked


@pytest.mark.parametrize(
    ("model", "out"),
    [("dir/net.pt", "net"), ("pkg.nets:small", "small"), ("a folder", "a-folder"), (".", None)],
)
def test_default_output_folder(
    command: Command, tmp_path: Path, monkeypatch: Any, model: str, out: str | None
) -> None:
    asked = _stub(monkeypatch, least())
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/net.pt").touch()
    (tmp_path / "a folder").mkdir()
    command("optimize", model)
    assert asked[0]["out"] == Path("attnopt-out") / (out or tmp_path.name)


@pytest.mark.parametrize(("met", "code"), [(True, 0), (False, 2)])
def test_exit_codes_of_a_verdict(command: Command, monkeypatch: Any, met: bool, code: int) -> None:
    _stub(monkeypatch, full(met=met))
    told = command("optimize", "m.pt", "--json")
    assert told.code == code and told.json["met"] is met and told.json["exit_code"] == code
    drawn = command("optimize", "m.pt")
    assert drawn.code == code and ("Budget met" if met else "Budget not met") in drawn.out
    if not met:
        assert "ceiling" in drawn.out and "would do" in drawn.out


def test_ctrl_c_says_how_to_go_on(command: Command, monkeypatch: Any) -> None:
    _stub(monkeypatch, KeyboardInterrupt())
    ended = command("optimize", "m.pt", "--out", "there")
    assert ended.code == 130 and ended.out == ""
    assert "optimize m.pt --out there --resume" in " ".join(ended.err.split())
    told = command("optimize", "m.pt", "--resume", "--json")
    assert told.code == 130
    assert told.error["help"].endswith("optimize m.pt --resume --json")


def test_ctrl_c_in_other_commands(command: Command, monkeypatch: Any) -> None:
    import attnopt.compiler.inspect

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(attnopt.compiler.inspect, "inspect", stop)
    told = command("attnopt", "inspect", "m.pt", "--json")
    assert told.code == 130 and told.error["what"] == "interrupted"


@pytest.mark.slow
def test_the_installed_script(tmp_path: Path) -> None:
    model, inputs = save_encoder(tmp_path)
    script = Path(sys.executable).parent / "attnopt"
    ended = subprocess.run(
        [script, "inspect", model, "--inputs", inputs, "--json"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["raised"] == 2
