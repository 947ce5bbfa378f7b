"""The small language model that comes with the project: what is in its folder, and how good it is.

Its quality is held against `metrics.json`, which the training script measures on the saved weights.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerance import assert_close

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PYLM = EXAMPLES / "models" / "pylm"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    return json.loads((PYLM / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(PYLM)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(PYLM, dtype=torch.float32).eval()


def read(name: str) -> str:
    return (PYLM / name).read_text(encoding="utf-8")


def test_the_folder_stays_small() -> None:
    sizes = {path.name: path.stat().st_size for path in PYLM.iterdir()}
    assert sum(sizes.values()) <= 15 * MEGABYTE
    assert sizes["eval.txt"] <= 0.5 * MEGABYTE
    assert sizes["calibration.txt"] <= 0.3 * MEGABYTE


def test_the_weights_are_half_precision_of_about_five_million_parameters() -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    weights = load_file(PYLM / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    assert all(w.isfinite().all() for w in weights.values())
    assert 4_000_000 < sum(w.numel() for w in weights.values()) < 7_000_000


def test_the_architecture_is_a_llama_with_one_key_value_head_per_query_head(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.num_key_value_heads == config.num_attention_heads == 8
    assert 6 <= config.num_hidden_layers <= 8
    assert config.max_position_embeddings >= 1024
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    "text",
    [
        "def f(x: int) -> int:\n\treturn x ** 2  # square\n",
        "naïve — ∑ 漢字 🐍",
        "  leading, trailing  \r\n\n",
        "",
    ],
)
def test_the_tokenizer_loses_nothing(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tokenizer_loses_nothing_of_the_held_out_text(tokenizer: Any) -> None:
    text = read("eval.txt")
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer)


def test_each_held_out_module_follows_a_separator(metrics: dict[str, Any], tokenizer: Any) -> None:
    ids = tokenizer(read("eval.txt")).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == len(metrics["held_out"])
    assert len(ids) == metrics["eval_tokens"]


def test_no_module_is_in_both_texts(tokenizer: Any) -> None:
    held_out = {m for m in read("eval.txt").split(tokenizer.bos_token) if m}
    training = {m for m in read("calibration.txt").split(tokenizer.bos_token) if m}
    assert len(held_out) > 10
    assert len(training) > 10
    assert not held_out & training


def windows(tokenizer: Any, metrics: dict[str, Any], count: int) -> torch.Tensor:
    """int64 [count, context + 1]; neighbours share a token, so each is predicted once."""
    context = metrics["context"]
    ids = torch.tensor(tokenizer(read("eval.txt")).input_ids)
    return ids.unfold(0, context + 1, context)[:count]


@torch.no_grad()
def mean_loss(model: Any, tokens: torch.Tensor) -> float:
    logits = model(input_ids=tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def test_the_held_out_loss_is_what_was_measured(
    model: Any, tokenizer: Any, metrics: dict[str, Any]
) -> None:
    tokens = windows(tokenizer, metrics, metrics["slice_windows"])
    # Four decimals are stored.
    expected = metrics["slice_loss_nats_per_token"]
    assert mean_loss(model, tokens) == pytest.approx(expected, abs=1e-3)


def test_the_model_has_learned_from_context(
    model: Any, tokenizer: Any, metrics: dict[str, Any]
) -> None:
    tokens = windows(tokenizer, metrics, 4)
    shuffled = tokens[:, torch.randperm(tokens.shape[1])]
    loss = mean_loss(model, tokens)
    assert loss < 0.5 * math.log(len(tokenizer))
    assert loss < mean_loss(model, shuffled) - 1.0


def test_cached_decoding_agrees_with_the_whole_sequence(model: Any, tokenizer: Any) -> None:
    ids = torch.tensor([tokenizer("def add(a, b):\n    return a").input_ids])
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        prefix = model(input_ids=ids[:, :-1], use_cache=True)
        last = model(input_ids=ids[:, -1:], past_key_values=prefix.past_key_values).logits[:, -1]
    # Logits are of order ten.
    assert_close(last / 10, whole / 10, "logits after a cached prefix")


def test_the_model_card_reports_the_measured_loss(metrics: dict[str, Any]) -> None:
    card = read("README.md")
    assert f"{metrics['loss_nats_per_token']:.4f} nats per token" in card
    assert f"{metrics['bits_per_byte']:.4f} bits per byte" in card
    assert all(f"`{name}`" in card for name in metrics["held_out"])
    assert "PSF" in card
    assert math.log(metrics["perplexity"]) == pytest.approx(
        metrics["loss_nats_per_token"], abs=1e-3
    )


def test_newton_schulz_brings_singular_values_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from train_pylm import orthogonalised

    for shape in ((3, 16, 40), (3, 40, 16), (2, 16, 16)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert values.max() < 1.25
        assert values.median() > 0.65


def test_a_resumed_sampler_draws_what_the_first_would_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from train_pylm import Sampler

    stream = torch.arange(1000)
    first = Sampler(stream, seed=3)
    for _ in range(7):
        first.batch(16, 4)
    resumed = Sampler(stream, 3, first.epoch, first.length, first.cursor)
    for length in (16, 16, 32):
        assert torch.equal(first.batch(length, 4), resumed.batch(length, 4))


@pytest.mark.slow
def test_the_training_script_runs_and_resumes(tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "pylm", tmp_path / "last.pt"
    command = [sys.executable, str(EXAMPLES / "train_pylm.py"), "--device", "cpu"]
    command += ["--threads", "1", "--layers", "1", "--batch-tokens", "1024"]
    command += ["--out", str(out), "--checkpoint", str(checkpoint)]
    subprocess.run([*command, "--minutes", "0.05"], check=True, timeout=600)
    first = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert first["steps"] >= 1
    assert 0 < first["loss_nats_per_token"] < 1.1 * math.log(first["vocabulary"])
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 1
    subprocess.run([*command, "--minutes", "0.1", "--resume"], check=True, timeout=600)
    second = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert second["steps"] > first["steps"]


@pytest.mark.slow
def test_the_training_script_refuses_an_empty_budget() -> None:
    command = [sys.executable, str(EXAMPLES / "train_pylm.py"), "--minutes", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "--minutes must be more than 0" in done.stderr
