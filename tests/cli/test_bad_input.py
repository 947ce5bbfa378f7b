"""Bad input through the command line: refused with a reason and a way on, without a traceback."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.cli.conftest import LENGTH, ROWS, WIDTH, Command, encoder, save_encoder

ASKED = ["--budget", "100x", "--max-drop", "20%", "--trials", "2", "--timeout", "10m"]


class Call:
    """Pickles as a call of os.system that would leave a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A good model and inputs for it."""
    return save_encoder(tmp_path)


def refused(command: Command, *argv: object) -> dict[str, str]:
    """The problem that `optimize` and `inspect` end with, both told alike."""
    told = command("optimize", *argv, "--json")
    assert told.code == 1, told
    assert command("attnopt", "inspect", *argv, "--json").error == told.error
    return told.error


def test_truncated_file(command: Command, files: tuple[Path, Path]) -> None:
    model, inputs = files
    model.write_bytes(model.read_bytes()[:-2000])
    error = refused(command, model, "--inputs", inputs)
    assert error["code"] == "A103" and "cut short" in error["what"]


def test_zip_bomb(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("bomb/data/0", bytes(64 << 20))
    error = refused(command, path)
    assert error["code"] == "A104" and "zip bomb" in error["why"]


def test_a_pickle_that_calls_os_system(command: Command, tmp_path: Path) -> None:
    model, marker = encoder(), tmp_path / "it-was-run"
    model.note = Call(marker)  # type: ignore[assignment]
    torch.save(model, tmp_path / "model.pt")
    error = refused(command, tmp_path / "model.pt")
    assert error["code"] == "A102" and "os.system" in " ".join(error.values())
    assert not marker.exists()
    pickle.loads(pickle.dumps(Call(marker)))
    assert marker.exists()  # the bait works


def test_nan_weights(command: Command, files: tuple[Path, Path]) -> None:
    model, inputs = files
    broken: Any = encoder()
    nn.init.constant_(broken.layers[1].norm1.weight, float("nan"))
    torch.save(broken, model)
    error = refused(command, model, "--inputs", inputs)
    assert error["code"] == "A108" and "layers.1.norm1.weight" in error["what"]


@pytest.mark.parametrize("name", ["optimize", "inspect"])
def test_a_model_with_no_attention(command: Command, tmp_path: Path, name: str) -> None:
    torch.save(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), tmp_path / "mlp.pt")
    torch.save(torch.ones(2, 4), tmp_path / "x.pt")
    argv = [name] if name == "inspect" else []
    command_name = "attnopt" if argv else "optimize"
    argv += [str(tmp_path / "mlp.pt"), "--inputs", str(tmp_path / "x.pt")]
    told = command(command_name, *argv, "--json")
    assert told.code == 3 and told.error["code"] == "A203"
    drawn = command(command_name, *argv)
    assert drawn.code == 3 and "no attention was found" in drawn.err


def test_wrong_input_shapes(command: Command, files: tuple[Path, Path], tmp_path: Path) -> None:
    torch.save(torch.randn(ROWS, LENGTH, WIDTH + 1), tmp_path / "wide.pt")
    error = refused(command, files[0], "--inputs", tmp_path / "wide.pt")
    assert error["code"] == "A109" and f"[{ROWS}, {LENGTH}, {WIDTH + 1}]" in error["what"]


def test_no_inputs(command: Command, files: tuple[Path, Path]) -> None:
    assert "--inputs" in refused(command, files[0])["help"]


def test_a_missing_file(command: Command) -> None:
    assert refused(command, "missing.pt")["code"] == "A101"


def test_unknown_dtype(command: Command, files: tuple[Path, Path]) -> None:
    error = refused(command, *files[:1], "--inputs", files[1], "--dtype", "float13")
    assert error["code"] == "A114" and "float32" in error["help"]


def test_unknown_target(command: Command, files: tuple[Path, Path]) -> None:
    error = command("optimize", files[0], "--target", "h1000", "--json").error
    assert error["code"] == "A401" and "h1000" in error["what"]
    assert "a100" in error["why"] and "cpu" in error["why"] and "h100" in error["help"]


@pytest.mark.parametrize("budget", ["0x", "0", "-1", "-1x", "nan", "infx", "fast", "2y", ""])
def test_budgets_that_mean_nothing(command: Command, files: tuple[Path, Path], budget: str) -> None:
    ended = command("optimize", files[0], f"--budget={budget}", "--json")
    assert ended.code == 1 and ended.error["code"] == "A410" and "2x" in ended.error["help"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--max-drop", "100%"), ("--max-drop", "-1%"), ("--max-drop", "little"), ("--trials", "0"),
     ("--timeout", "soon"), ("--timeout", "0s"), ("--effort", "heroic"), ("--kv-bytes", "half"),
     ("--kv-bytes", "0%"), ("--kv-bytes", "100%"), ("--kv-bytes", "50")],
)  # fmt: skip
def test_demands_that_mean_nothing(
    command: Command, files: tuple[Path, Path], option: str, value: str
) -> None:
    ended = command("optimize", files[0], f"{option}={value}", "--json")
    assert ended.code == 1 and ended.error["code"] == "A410"


def test_output_paths_that_cannot_be_written(
    command: Command, files: tuple[Path, Path], tmp_path: Path
) -> None:
    for out in ("/dev/null/out", files[1], files[1] / "below"):
        ended = command("optimize", *files[:1], "--out", out, "--json")
        assert ended.code == 1 and ended.error["code"] == "A502", out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    ended = command("optimize", files[0], "--out", tmp_path / "mine", "--json")
    assert ended.error["code"] == "A508" and (tmp_path / "mine/thesis.tex").exists()


def test_a_model_without_weights(command: Command, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=16, intermediate_size=32, vocab_size=99,
        num_hidden_layers=1, num_attention_heads=2,
    ).save_pretrained(tmp_path / "bare")  # fmt: skip
    ended = command("optimize", tmp_path / "bare", "--json")
    assert ended.code == 1 and ended.error["code"] == "A118"
    assert "inspect" in ended.error["help"]


def test_apply_and_check_of_folders_that_hold_no_run(command: Command, tmp_path: Path) -> None:
    told = command("attnopt", "check", tmp_path, tmp_path / "model.pt", "--json")
    assert told.code == 1 and told.error["code"] in ("A505", "A511")
    told = command("attnopt", "apply", tmp_path, "model.pt", "--out", tmp_path / "o", "--json")
    assert told.code == 1 and told.error["code"] == "A505"
    (tmp_path / "plan.json").write_text('{"format": 99, "steps": []}')
    told = command(
        "attnopt", "apply", tmp_path / "plan.json", "m.pt", "--out", tmp_path / "o", "--json"
    )
    assert told.error["code"] == "A501"


def _search(folder: Path, *more: str) -> subprocess.Popen[str]:
    script = "from attnopt.cli.main import optimize_main; optimize_main()"
    files = ["encoder.pt", "--inputs", "inputs.pt", "--out", "out"]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", script, *files, *ASKED, *more],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Shells start jobs in the background with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def _measured(journal: Path) -> list[str]:
    """What was measured, in order; a line cut off by the kill is no measurement."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [json.loads(line)["key"] for line in lines if line.endswith("}")]


@pytest.mark.slow
def test_ctrl_c_in_mid_search_and_resume(tmp_path: Path) -> None:
    save_encoder(tmp_path, batches=8)
    journal = tmp_path / "out/.work/measurements.jsonl"
    first = _search(tmp_path)
    deadline = time.monotonic() + 400
    while len(_measured(journal)) < 2 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.poll() is None, first.communicate()[1]
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 130 and "--resume" in said, said
    before = _measured(journal)
    assert len(before) >= 2 and not (tmp_path / "out/model.pt2").exists()

    again = _search(tmp_path, "--resume", "--json")
    out, said = again.communicate(timeout=500)
    assert again.returncode == 2, said
    after = _measured(journal)
    assert after[: len(before)] == before
    assert max(Counter(after).values()) == 1, "something was measured twice"
    assert json.loads(out)["relaxation"] and (tmp_path / "out/model.pt2").exists()
