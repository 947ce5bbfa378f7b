"""Plans as checkpoints of transformers: the same logits and tokens where attnopt is not there, and
a reason wherever a family has no field for what a plan did."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.compiler.artifact import read_plan
from attnopt.compiler.checkpoint import Written, changes, place, write, write_checkpoint
from attnopt.compiler.checkpoint.reload import Reloaded
from attnopt.compiler.contract import Notes
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.intake.source import load
from attnopt.compiler.pipeline import apply_plan, read
from attnopt.compiler.plan import Plan, Step
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.spec import Mask
from tests.families import VOCABULARY
from tests.programs import EXACT
from tests.stock_transformers import STOCK
from tests.tolerance import assert_close

transformers = pytest.importorskip("transformers")
LENGTH, PROMPT, NEW = 24, 6, 64
_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig",
              {"num_hidden_layers": 2, "num_key_value_heads": 2, **_SIZES}),
    "mistral": ("MistralForCausalLM", "MistralConfig",
                {"num_hidden_layers": 2, "num_key_value_heads": 2, "sliding_window": None,
                 **_SIZES}),
    "wide": ("MistralForCausalLM", "MistralConfig",
             {"num_hidden_layers": 2, "num_key_value_heads": 4, "sliding_window": None, **_SIZES}),
    "every_other_pair": ("LlamaForCausalLM", "LlamaConfig",
                         {"num_hidden_layers": 1, "num_key_value_heads": 2, **_SIZES}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config",
              {"num_hidden_layers": 1, "num_key_value_heads": 2, **_SIZES}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config",
             {"num_hidden_layers": 1, "num_key_value_heads": 2, "pad_token_id": 0, **_SIZES}),
    "falcon": ("FalconForCausalLM", "FalconConfig",
               {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                "num_kv_heads": 4, "vocab_size": VOCABULARY, "new_decoder_architecture": True}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"num_hidden_layers": 1, **_SIZES}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config",
             {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 128,
              "vocab_size": VOCABULARY}),
    "bert": ("BertForMaskedLM", "BertConfig",
             {"num_hidden_layers": 1, "pad_token_id": 0, **_SIZES}),
}  # fmt: skip
BLOCK = Step("skip_sublayers{method=delete}", ("b1.attention", "b1.mlp"))
MERGE, REFIT = Step("merge_kv_heads{factor=2}"), Step("refit{}")


def _prune(keep: float, site: str = "*") -> Step:
    return Step(f"prune_heads{{keep={keep} method=energy}}", (site,))


HEAL = Step("heal{tokens=800 local=0}")
SHRINK = Step("shrink_head_dim{keep=0.5}")
PLANS: dict[str, tuple[str, tuple[Step, ...]]] = {
    "exact": ("llama", ()),
    "merged": ("llama", (MERGE, REFIT)),
    "a block less": ("llama", (BLOCK,)),
    "an attention less": ("llama", (Step("skip_sublayers{method=delete}", ("b1.attention",)),)),
    "windows": ("mistral", (Step("sliding_window{left=8 sink=0}"),)),
    "pruned and healed": ("qwen2", (_prune(0.5), HEAL)),
    "pruned unlike": ("wide", (_prune(0.5, "s0"), _prune(0.75, "s1"))),
    "smaller heads": ("every_other_pair", (SHRINK,)),
}


@dataclass(frozen=True)
class Given:
    """A model on disk, and read."""

    folder: Path
    loaded: Loaded
    program: Program


@lru_cache(maxsize=len(_MODELS))
def given(name: str) -> Given:
    """A tiny random model, saved with a file that a tokenizer would have."""
    head, config, sizes = _MODELS[name]
    folder = Path(mkdtemp()) / name
    torch.manual_seed(0)
    model = getattr(transformers, head)(getattr(transformers, config)(**sizes))
    if name == "every_other_pair":
        _quiet_pairs(model)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "README.md").write_text("of the original")
    loaded = load(str(folder), length=LENGTH)
    return Given(folder, loaded, read(loaded))


def _quiet_pairs(model: Any) -> None:
    """Let every second rotary pair, those in odd dims, add next to nothing to a logit: the pairs
    that are left turn as those of heads of half the dims do."""
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for weight in (attention.q_proj.weight, attention.k_proj.weight):
            weight[1::2] *= 0.01


def _data(name: str, count: int, seed: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        inputs = {"input_ids": torch.randint(3, VOCABULARY, (8, LENGTH), generator=draw)}
        if "attention_mask" in given(name).loaded.kwargs:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        found.append(Batch((), inputs))
    return found


def optimized(name: str, steps: tuple[Step, ...]) -> tuple[Plan, Program, list[Any]]:
    """A plan with the exact rewrites and these steps, and what it made of a model."""
    plan = Plan((*(Step(exact) for exact in EXACT), *steps))
    notes = Notes(given(name).program, _data(name, 3, 1), _data(name, 2, 2))
    made, outcomes = apply_plan(given(name).program, plan, notes)
    applied = {outcome.rewrite for outcome in outcomes if outcome.applied}
    assert {step.rewrite.split("{")[0] for step in steps} <= {
        text.split("{")[0] for text in applied
    }
    return plan, made, outcomes


def export(name: str, steps: tuple[Step, ...], out: Path) -> tuple[Written, Program]:
    plan, made, outcomes = optimized(name, steps)
    model = given(name)
    written = write_checkpoint(model.loaded, model.program, made, plan, outcomes, model.folder, out)
    return written, made


def _refused(name: str, steps: tuple[Step, ...], out: Path) -> Problem:
    with pytest.raises(Problem) as caught:
        export(name, steps, out)
    assert caught.value.code == "A521"
    assert not out.exists() and not list(out.parent.iterdir())
    return caught.value


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Written, Program]]:
    home = tmp_path_factory.mktemp("plans")
    return {name: export(*PLANS[name], home / name) for name in PLANS}


def test_plans_in_stock_transformers(
    written: dict[str, tuple[Written, Program]], tmp_path: Path
) -> None:
    """In a process where attnopt cannot be imported."""
    prompt = torch.randint(3, VOCABULARY, (2, PROMPT))
    torch.save(prompt, tmp_path / "prompt.pt")
    folders = {name: str(made.folder) for name, (made, _) in written.items()}
    script = STOCK.replace("NEW", str(NEW))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", script, *folders.values()], cwd=tmp_path,
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "found.pt")
    seen = []
    for name, (_, program) in written.items():
        logits, tokens = found[folders[name]]
        own = program.run(Batch((), {"input_ids": tokens}))["logits"]
        assert_close(logits, own, name)
        assert tokens.shape[1] == PROMPT + NEW
        # The most likely token at each place is the one that was taken: so greedy ends the same.
        assert torch.equal(tokens[:, PROMPT:], own.argmax(-1)[:, PROMPT - 1 : -1]), name
        seen.append(logits)
    assert not any(torch.allclose(seen[0], other) for other in seen[1:])


def test_what_is_said_of_each(written: dict[str, tuple[Written, Program]]) -> None:
    told = {name: dict(made.settings) for name, (made, _) in written.items()}
    assert told == {
        "exact": {}, "an attention less": {},
        "merged": {"num_key_value_heads": (2, 1)},
        "a block less": {"num_hidden_layers": (2, 1)},
        "windows": {"sliding_window": (None, 8)},
        "pruned and healed": {
            "num_attention_heads": (4, 2), "num_key_value_heads": (2, 1), "head_dim": (None, 16),
        },
        "pruned unlike": {"num_attention_heads": (4, 3), "num_key_value_heads": (4, 3)},
        "smaller heads": {"head_dim": (16, 8)},
    }  # fmt: skip
    filled = {name: dict(made.padded) for name, (made, _) in written.items() if made.padded}
    assert filled == {"pruned unlike": {"model.layers.0.self_attn": (2, 3)}}
    silent = {name: made.zeroed for name, (made, _) in written.items() if made.zeroed}
    assert silent == {"an attention less": ("model.layers.1.self_attn.o_proj",)}
    for made, _ in written.values():
        assert set(made.kept) <= {"simplify_mask", "fold_repeated_kv", "fuse_attention"}
        assert made.error < 1e-5 and made.dtype == "float32"
        assert {"model.safetensors", "config.json", "plan.json", "vocab.txt"} <= set(made.files)
        assert "README.md" not in made.files
        assert {path.name for path in made.folder.iterdir()} == set(made.files)
    for name in ("merged", "pruned and healed", "pruned unlike", "smaller heads"):
        was, now = written[name][0].parameters
        assert now < was, name


_EXPORTS: dict[str, tuple[str, tuple[Step, ...], dict[str, Any], tuple[str, ...]]] = {
    "fused projections": ("phi3", (MERGE,), {"num_key_value_heads": (2, 1)}, ()),
    "weights read through a view": ("falcon", (MERGE,), {"num_kv_heads": (4, 2)}, ()),
    "weights the other way round": (
        "gpt2", (Step("skip_sublayers{method=delete}", ("b0.mlp",)),), {},
        ("transformer.h.0.mlp.c_proj",),
    ),
    "a norm after the sum, which stays": (
        "bert", (Step("skip_sublayers{method=delete}", ("b0.attention", "b0.mlp")),), {},
        ("bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.0.output.dense"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _EXPORTS)
def test_other_families(name: str, tmp_path: Path) -> None:
    """Writing compares the reloaded checkpoint with the program itself."""
    model, steps, told, zeroed = _EXPORTS[name]
    written, _ = export(model, steps, tmp_path / "out")
    assert (dict(written.settings), written.zeroed) == (told, zeroed)


_REFUSED: dict[str, tuple[str, tuple[Step, ...], str, str]] = {
    "a linear map": (
        "llama", (Step("skip_sublayers{method=linear}", ("b1.mlp",)),), "model.layers.1.mlp",
        "no family has a linear map",
    ),
    "one layer merged": (
        "llama", (Step(MERGE.rewrite, ("s1",)),), "model.layers.0.self_attn",
        "one num_key_value_heads for all layers",
    ),
    "no field for a window": (
        "llama", (Step("sliding_window{left=8 sink=0}"),), "model.layers.0.self_attn",
        "llama has no field for a window",
    ),
    "no field for sinks": (
        "mistral", (Step("sliding_window{left=8 sink=4}"),), "model.layers.0.self_attn",
        "the first keys (sink)",
    ),
    "one layer with a window": (
        "mistral", (Step("sliding_window{left=8 sink=0}", ("s1",)),), "model.layers.0.self_attn",
        "one window for all layers",
    ),
    "some heads with a window": (
        "mistral", (Step("sliding_window{left=8 sink=0 groups=[1]}", ("s1",)),),
        "model.layers.1.self_attn", "all heads of an attention at once",
    ),
    "one layer pruned": (
        "wide", (_prune(0.5, "s1"),), "model.layers.0.self_attn",
        "one number of heads for all layers",
    ),
    "no field for the dim of a head": (
        "gpt2", (_prune(0.5),), "transformer.h.0.attn", "divides its width",
    ),
    "pairs that turn otherwise": (
        "llama", (SHRINK,), "model.layers.0.self_attn", "not by 1, 0.316, 0.0316, 0.01",
    ),
    "keys of another layer": (
        "llama", (Step("share_kv_layers{span=2}"),), "s1", "would make other keys",
    ),
    "no field for groups": (
        "gpt_neox", (MERGE,), "gpt_neox.layers.0.attention", "gpt_neox has no field",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", _REFUSED)
def test_what_a_family_cannot_say(name: str, tmp_path: Path) -> None:
    model, steps, where, why = _REFUSED[name]
    refused = _refused(model, steps, tmp_path / "out")
    assert refused.where == where and why in refused.why


def test_a_rewrite_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "EXPRESSED", ("refit",))
    refused = _refused("llama", (BLOCK,), tmp_path / "out")
    assert refused.where == "b1.attention" and "`skip_sublayers`" in refused.what


_NORM = "transformer.ln_f.weight"


def _wrong(call: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    def changed(*arguments: Any) -> dict[str, Tensor]:
        found = call(*arguments)
        return found | {_NORM: 1.01 * found[_NORM]}

    return changed


def test_a_wrong_answer_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "by_name", _wrong(write.by_name))
    with pytest.raises(Problem) as caught:
        export("gpt2", (), tmp_path / "out")
    assert caught.value.code == "A522" and not list(tmp_path.iterdir())


def test_a_wrong_answer_once_reloaded_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(model: Any, folder: Path) -> None:
        model.transformer.ln_f.weight = torch.nn.Parameter(1.01 * model.transformer.ln_f.weight)
        save(model, folder)

    save = write._save
    monkeypatch.setattr(write, "_save", spoiled)
    with pytest.raises(Problem) as caught:
        export("gpt2", (), tmp_path / "out")
    assert caught.value.code == "A522" and "reloaded" in caught.value.why
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, fresh: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "copy_files", refuse)
    with pytest.raises(Problem) as caught:
        export("gpt2", (), tmp_path / "out")
    assert caught.value.code == "A502" and "No space" in caught.value.why
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_goes_and_what_a_killed_one_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for names in (("vocab.txt", "model-00001-of-00002.safetensors"), ("merges.txt",)):
        with place.beside(out) as fresh:
            fresh.with_name(fresh.name + "killed").mkdir()
            for name in names:
                (fresh / name).touch()
            place.write_plan(Plan(()), fresh)
            assert set(place.put(fresh, out)) == {*names, "plan.json"}
        (out / "mine.txt").touch()
    assert {path.name for path in out.iterdir()} == {"merges.txt", "plan.json", "mine.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_plan(out) == Plan(())


@pytest.mark.parametrize("masked", [False, True])
def test_windows_are_compared_beyond_them_with_a_mask_or_without(masked: bool) -> None:
    site = given("mistral").program.sites[0]
    ids = torch.zeros(2, 4, dtype=torch.int64)
    inputs = {"input_ids": ids, **({"attention_mask": ids.bool()} if masked else {})}
    made: Any = SimpleNamespace(
        pairs=(changes.Pair(site, site, Mask("window", left=8)),),
        program=SimpleNamespace(example=Batch((), inputs)),
    )
    reloaded: Any = object.__new__(Reloaded)
    reloaded.model = given("mistral").loaded.module
    (batch,) = reloaded._beyond(made)
    assert batch.kwargs.keys() == inputs.keys() and batch.kwargs["input_ids"].shape == (2, 25)
    assert not masked or bool(batch.kwargs["attention_mask"].all())
    made.program.example = Batch((), {**inputs, "position_ids": ids})
    assert not reloaded._beyond(made)
