"""`attnopt export --hf` over the command line: a run with fitted steps, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.autotune import checkpoint
from attnopt.cli import export
from attnopt.compiler.artifact import save, source_sha256
from attnopt.compiler.checkpoint import Written
from attnopt.compiler.contract import Notes
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import apply_plan, read
from attnopt.compiler.plan import Plan, Step
from attnopt.compiler.program import Batch
from attnopt.passes.heal import Heal
from tests.autotune.results import least
from tests.cli.conftest import Command

HEAL = Step("heal{tokens=640 local=0 rate=0.005}")
PLAN = Plan(
    (Step("fuse_attention{}"), Step("merge_kv_heads{factor=2 method=mean}"), Step("refit{}"), HEAL)
)
LENGTH = 16


def _model(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _run(model: Path, out: Path) -> None:
    """The folder of a run, with figures that nobody measured."""
    program = read(load(str(model), length=LENGTH))
    batches = [Batch((), {"input_ids": torch.randint(0, 50, (4, LENGTH))}) for _ in range(4)]
    kept = {"calibration": batches[:2], "heldout": batches[2:]}
    made, outcomes = apply_plan(program, PLAN, Notes(program, *kept.values()))
    assert outcomes[-1].applied, outcomes[-1].reason
    told = replace(
        least(), plan=PLAN, outcomes=tuple(outcomes), model_sha256=source_sha256(model),
        command=f"attnopt optimize {model} --out {out}",
    )  # fmt: skip
    save(out, made, PLAN, told, kept)


def _also(out: Path, rewrite: str) -> None:
    """Say in the files of a run that one more rewrite was made."""
    files = (("plan.json", "steps", {}), ("report.json", "outcomes", {"applied": True}))
    for name, key, more in files:
        told = json.loads((out / name).read_text())
        told[key].append({**told[key][-1], "rewrite": rewrite, **more})
        (out / name).write_text(json.dumps(told))


def _error(command: Command, *words: object) -> dict[str, Any]:
    ended = command("attnopt", "export", *words, "--json")
    assert ended.code == 1
    return ended.error


def _not_again(*arguments: object) -> None:
    raise AssertionError("the weights of the run are there: nothing is trained again")


def test_a_run_becomes_a_model_of_transformers(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = _model(tmp_path / "model"), tmp_path / "out"
    _run(model, out)
    monkeypatch.setattr(Heal, "rewrite", _not_again)
    with monkeypatch.context() as without:
        without.setattr(checkpoint, "_with_weights", lambda program, saved: program)
        assert _error(command, out, "--hf", "new")["code"] == "A522"
    assert not Path("new").exists()
    told = command("attnopt", "export", out, "--hf", "new", "--json").json
    assert told["settings"] == {"num_key_value_heads": {"was": 2, "now": 1}}
    assert told["family"] == "LlamaForCausalLM" and told["error"] < 1e-5
    assert (
        told["padded"] == {}
        and told["kept"] == ["fuse_attention"]
        and "model.safetensors" in told["files"]
    )
    again = read(load("new", length=LENGTH))
    assert [site.kv_heads for site in again.sites] == [1]
    stale = tmp_path / "new" / "model-00001-of-00002.safetensors"
    stale.touch()
    ended = command("attnopt", "export", out / "plan.json", "--hf", "new", "--model", model)
    assert ended.code == 0 and not stale.exists()
    assert "num_key_value_heads: 2 -> 1" in ended.out
    assert "change no function: fuse_attention" in ended.out
    for place, why in ((out, "holds a run"), (model, "the original model")):
        error = _error(command, out, "--hf", place)
        assert error["code"] == "A523" and why in error["why"]
    (model / "more.txt").touch()
    assert _error(command, out, "--hf", "other")["code"] == "A513"
    _also(out, "low_rank_projections{}")  # known before the original is looked at
    error = _error(command, out, "--hf", "other")
    assert error["code"] == "A521" and "two products" in error["why"]
    (model / "config.json").unlink()
    assert _error(command, out, "--hf", "other")["code"] == "A521"
    assert not Path("other").exists()


def test_heads_of_zeros_are_told(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Written(
        tmp_path, "LlamaForCausalLM", ("config.json",), {"num_attention_heads": (8, 4)}, (), (),
        0.0, "float32", (200, 100), {"layers.0": (3, 4)},
    )  # fmt: skip
    monkeypatch.setattr(checkpoint, "export_checkpoint", lambda *_, **__: made)
    monkeypatch.setattr(export, "_as_then", lambda home, model, form: (model, {}))
    ended = command("attnopt", "export", tmp_path, "--hf", "new", "--model", tmp_path)
    assert "layers.0 keeps 3 heads, filled up with zeros to 4" in ended.out
    told = command("attnopt", "export", tmp_path, "--hf", "new", "--model", tmp_path, "--json")
    assert told.json["padded"] == {"layers.0": [3, 4]}


def test_one_of_the_two_is_asked_for(command: Command) -> None:
    for more in ((), ("--hf", "a", "--onnx", "b")):
        error = _error(command, "out", *more)
        assert error["code"] == "A610" and "--onnx" in error["what"]


def test_what_the_other_one_takes_is_refused(command: Command) -> None:
    for more, vain in (
        (("--hf", "a", "--opset", "24"), "--opset"),
        (("--onnx", "a", "--model", "b", "--trust"), "--model, --trust"),
        (("--onnx", "a", "--dtype", "float32"), "--dtype"),
    ):
        error = _error(command, "out", *more)
        assert error["code"] == "A610" and error["what"].startswith(f"{vain} can")


def test_it_needs_a_run(command: Command) -> None:
    assert _error(command, "none", "--hf", "new")["code"] == "A505"
