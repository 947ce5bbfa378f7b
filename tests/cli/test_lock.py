"""`inspect --lock` and `check --lock` from one end to the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command, save_encoder

_MODEL = """
import torch
from torch import nn

class Attention(nn.Module):
    odd = False

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (p.unflatten(2, (2, 8)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2)
        return ((scores.sin() if self.odd else scores).softmax(-1) @ v).transpose(1, 2).flatten(2)

class Model(nn.Module):
    def __init__(self, odd=(False, False)):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in odd)
        for layer, flag in zip(self.layers, odd):
            layer.odd = flag

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x

def before():
    return Model().eval(), torch.randn(2, 6, 16)

def odd():
    return Model((True,)).eval(), torch.randn(2, 6, 16)

def after():
    return Model((False, True)).eval(), torch.randn(2, 6, 16)
"""


@pytest.fixture
def locked(command: Command, tmp_path: Path) -> Path:
    """The lock of the model before."""
    (tmp_path / "lock_model.py").write_text(_MODEL)
    ended = command(
        "attnopt", "inspect", "lock_model:before", "--no-time", "--lock", "attnopt.lock"
    )
    assert ended.code == 0, ended.err
    return tmp_path / "attnopt.lock"


def test_the_same_model_holds(command: Command, locked: Path) -> None:
    told = command("attnopt", "check", "--lock", locked, "lock_model:before", "--json")
    assert told.code == 0
    assert told.json == {"ok": True, "changes": [], "versions": {}, "notes": []}
    drawn = command("attnopt", "check", "--lock", locked, "lock_model:before")
    assert drawn.code == 0 and "the lock holds: 2 attentions" in drawn.out


def test_an_attention_that_is_lost_is_named_with_the_versions_that_changed(
    command: Command, locked: Path
) -> None:
    told = json.loads(locked.read_text())
    told["versions"]["torch"] = "2.11.0"
    locked.write_text(json.dumps(told))
    ended = command("attnopt", "check", "--lock", locked, "lock_model:after")
    assert ended.code == 2
    assert "lost       layers.1: no longer understood: `aten.sin" in ended.out
    assert "torch: 2.11.0 in the lock" in ended.out
    assert "the lock does not hold: 1 of 2 attentions" in ended.out


def test_gains_do_not_fail(command: Command, locked: Path) -> None:
    argv = ("inspect", "lock_model:after", "--no-time", "--lock", "other.lock", "--json")
    assert command("attnopt", *argv).code == 0
    ended = command("attnopt", "check", "--lock", "other.lock", "lock_model:before", "--json")
    assert ended.code == 0
    assert [change["kind"] for change in ended.json["changes"]] == ["gained"]


def test_nothing_is_locked_where_too_little_is_understood(command: Command, locked: Path) -> None:
    before = locked.read_bytes()
    ended = command(
        "attnopt", "inspect", "lock_model:after", "--no-time", "--lock", locked,
        "--require-coverage", "100%",
    )  # fmt: skip
    assert ended.code == 3 and locked.read_bytes() == before


def test_a_question_does_not_hide_that_nothing_was_locked(command: Command, locked: Path) -> None:
    argv = ("inspect", "lock_model:odd", "--no-time", "--why", "u0", "--json")
    assert command("attnopt", *argv).code == 0
    ended = command("attnopt", *argv, "--lock", "odd.lock")
    assert ended.code == 3 and ended.error["code"] and not Path("odd.lock").exists()
    assert not locked.with_name("odd.lock").exists()


def test_options_of_the_lock_are_taken_over(
    command: Command, locked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = json.loads(locked.read_text())
    told["options"] |= {"dtype": "float32", "length": 7, "batch": 3}
    locked.write_text(json.dumps(told))
    asked: dict[str, Any] = {}

    def inspect(model: str, **given: Any) -> None:
        asked.update(given, model=model)
        raise KeyboardInterrupt

    import attnopt.compiler.inspect

    monkeypatch.setattr(attnopt.compiler.inspect, "inspect", inspect)
    command("attnopt", "check", "--lock", locked, "lock_model:before", "--length", "9")
    assert (asked["dtype"], asked["length"], asked["batch"]) == ("float32", 9, 3)
    assert asked["model"] == "lock_model:before" and asked["time"] is False


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lock", "attnopt.lock"], "the model to compare with the lock is missing"),
        (["--lock", "attnopt.lock", "a", "b"], "DIR and --lock are two checks"),
        (["--lock", "attnopt.lock", "a", "--min-speed", "2x"], "--min-speed has no meaning"),
        (["--lock", "attnopt.lock", "a", "--max-drop", "1%"], "--max-drop has no meaning"),
    ],
)
def test_command_lines_that_ask_for_two_things(
    command: Command, argv: list[str], said: str
) -> None:
    ended = command("attnopt", "check", *argv, "--json")
    assert ended.code == 1 and ended.error["code"] == "A614" and said in ended.error["what"]


def test_without_a_lock_the_folder_is_still_needed(command: Command) -> None:
    ended = command("attnopt", "check", "--json")
    assert ended.code == 1 and ended.error["code"] == "A610" and "DIR" in ended.error["what"]


def test_a_lock_that_is_not_there_or_no_lock_is_a_problem(command: Command, tmp_path: Path) -> None:
    (tmp_path / "broken.lock").write_text("{")
    for name in ("none.lock", "broken.lock"):
        ended = command("attnopt", "check", "--lock", name, "lock_model:before", "--json")
        assert ended.code == 1 and ended.error["code"] == "A516", name


def test_a_place_that_cannot_be_written_is_told_before_any_work(
    command: Command, tmp_path: Path
) -> None:
    model, inputs = save_encoder(tmp_path)
    for option in ("--lock", "--dot", "--svg"):
        ended = command(
            "attnopt", "inspect", model, "--inputs", inputs, option, "no/such/file", "--json"
        )
        assert ended.code == 1 and ended.error["code"] == "A502", option
