"""Directories of save_pretrained: real weights, none, unsafe ones, and what is made up for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt.compiler.errors import Problem
from attnopt.compiler.intake import load
from attnopt.compiler.intake.hf_model import HFModel
from attnopt.compiler.intake.weightless import is_weightless
from tests.compiler.intake.conftest import Command
from tests.tolerance import assert_close

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 99}


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(
        **SMALL, num_attention_heads=2, max_position_embeddings=48, **changes
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SMALL, num_attention_heads=2))


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    return transformers.ViTModel(config)


def t5(cls: str) -> Any:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=99,
        decoder_start_token_id=0,
    )  # fmt: skip
    return getattr(transformers, cls)(config)


def add_tokenizer(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "three", "four"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def test_llama_directory(tmp_path: Path) -> None:
    model = llama().eval()
    model.save_pretrained(tmp_path / "tiny")
    loaded = load(str(tmp_path / "tiny"))
    assert (loaded.kind, loaded.task, loaded.name) == ("hf", "causal-lm", "tiny")
    assert (loaded.root_prefix, loaded.weights, loaded.args) == ("hf.", "real", ())
    assert list(loaded.kwargs) == ["input_ids"] and loaded.kwargs["input_ids"].shape == (2, 48)
    assert loaded.sequence_dims == {"input_ids": {0: "batch", 1: "seq"}}
    assert any("made from the config: input_ids int64 [2, 48]" in note for note in loaded.notes)
    assert loaded.module is not None
    with torch.no_grad():
        out = loaded.module(**loaded.kwargs)
        expected = model(**loaded.kwargs).logits
    assert list(out) == ["logits"]
    assert_close(out["logits"], expected)


def test_bert_directory(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    loaded = load(str(tmp_path), batch=3, length=7)
    assert loaded.task == "encoder"
    assert {n: tuple(t.shape) for n, t in loaded.kwargs.items()} == {
        "input_ids": (3, 7),
        "attention_mask": (3, 7),
    }
    assert loaded.module is not None
    out = loaded.module(**loaded.kwargs)
    assert set(out) == {"last_hidden_state", "pooler_output"}


@pytest.mark.parametrize(
    ("make", "task", "names"),
    [
        (vit, "vision", {"pixel_values"}),
        (lambda: t5("T5EncoderModel"), "encoder", {"input_ids", "attention_mask"}),
        (
            lambda: t5("T5ForConditionalGeneration"),
            "seq2seq",
            {"input_ids", "attention_mask", "decoder_input_ids"},
        ),
    ],
)
def test_other_tasks(make: Any, task: str, names: set[str], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert loaded.task == task and set(loaded.kwargs) == names


@pytest.mark.parametrize("make", [llama, bert, vit])
def test_the_same_models_pickled(make: Any, tmp_path: Path) -> None:
    model = make().eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = load(str(tmp_path / "model.pt"))
    assert loaded.kind == "pickle" and isinstance(loaded.module, HFModel)
    with torch.no_grad():
        out, expected = loaded.module(**loaded.kwargs), model(**loaded.kwargs)
    for name, value in out.items():
        assert_close(value, expected[name])


def test_the_wrapper_exports_to_plain_tensors(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    loaded = load(str(tmp_path), length=8)
    assert loaded.module is not None
    program = torch.export.export(loaded.module, (), loaded.kwargs, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    again = load(str(tmp_path / "model.pt2"))
    assert again.kind == "export" and list(again.kwargs) == ["input_ids"]


def test_config_without_weights(tmp_path: Path) -> None:
    llama(architectures=["LlamaForCausalLM"]).config.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert loaded.weights == "meta" and loaded.module is not None
    assert all(is_weightless(p) for p in loaded.module.parameters())
    assert loaded.kwargs["input_ids"].device.type == "cpu"
    assert any("no weights" in note for note in loaded.notes)


def test_weights_in_no_file_are_told(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    llama().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert any("model.norm.weight" in note for note in load(str(tmp_path)).notes)


def test_nan_weights_are_named_without_the_wrapper(tmp_path: Path) -> None:
    model = llama()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    model.save_pretrained(tmp_path)
    with pytest.raises(Problem, match=r"NaN: model\.norm\.weight"):
        load(str(tmp_path))


def test_stored_dtype_is_kept_unless_asked(tmp_path: Path) -> None:
    llama().to(torch.float16).save_pretrained(tmp_path)
    kept, changed = load(str(tmp_path)), load(str(tmp_path), dtype=torch.float32)
    assert kept.module is not None and changed.module is not None
    assert {p.dtype for p in kept.module.parameters()} == {torch.float16}
    assert {p.dtype for p in changed.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_override(tmp_path: Path, attention: str) -> None:
    llama().save_pretrained(tmp_path)
    loaded = load(str(tmp_path), attention=attention)
    assert isinstance(loaded.module, HFModel)
    assert loaded.module.hf.config._attn_implementation == attention


def test_a_pickled_model_cannot_ask_for_a_kernel_to_be_fetched(tmp_path: Path) -> None:
    model = llama()
    model.config._attn_implementation_internal = "someone/kernel"
    torch.save(model, tmp_path / "model.pt")
    loaded = load(str(tmp_path / "model.pt"))
    assert isinstance(loaded.module, HFModel)
    assert loaded.module.hf.config._attn_implementation == "eager"


def test_unknown_attention(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(Problem) as caught:
        load(str(tmp_path), attention="magic")
    assert caught.value.code == "A114" and "eager, sdpa" in caught.value.help


def test_bin_weights(tmp_path: Path) -> None:
    model = llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(
        json.dumps(
            json.loads((tmp_path / "config.json").read_text())
            | {"architectures": ["LlamaForCausalLM"]}
        )
    )
    loaded = load(str(tmp_path))
    assert loaded.weights == "real" and isinstance(loaded.module, HFModel)
    assert_close(loaded.module.hf.lm_head.weight, model.lm_head.weight)


def test_bin_weights_that_run_a_command(tmp_path: Path, command: Command, marker: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    torch.save({"weight": command}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Problem, match=r"system") as caught:
        load(str(tmp_path))
    assert caught.value.code == "A102" and not marker.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["MysteryForCausalLM"], "auto_map": {"AutoModel": "m.M"}}, "never run"),
        ({"architectures": ["MysteryForCausalLM"]}, "has no MysteryForCausalLM"),
        ({"architectures": None, "model_type": "mystery"}, "has no mystery"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"attn_implementation": "someone/kernel"}, "would be fetched"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(Problem, match=said) as caught:
        load(str(tmp_path))
    assert caught.value.code == "A106"


def test_damaged_config_and_weights(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(Problem) as caught:
        load(str(tmp_path))
    assert caught.value.code == "A103" and caught.value.where == str(weights)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Problem) as caught:
        load(str(tmp_path))
    assert caught.value.code == "A103"


def test_a_directory_without_config(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "inner")
    with pytest.raises(Problem) as caught:
        load(str(tmp_path))
    assert caught.value.code == "A106" and "inner" in caught.value.help


@pytest.mark.parametrize(("batch", "length"), [(2, 49), (0, 4), (2, 0)])
def test_sizes_that_do_not_fit(tmp_path: Path, batch: int, length: int) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(Problem) as caught:
        load(str(tmp_path), batch=batch, length=length)
    assert caught.value.code == "A116"


def test_real_sentences_for_an_encoder(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text("one\n\none two three\ntwo four\n")
    loaded = load(str(tmp_path), text=tmp_path / "text.txt")
    assert loaded.tokenizer is not None
    assert loaded.kwargs["attention_mask"].tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0],
    ]


def test_real_text_for_a_language_model(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text("one two three four " * 8)
    loaded = load(str(tmp_path), text=tmp_path / "text.txt", length=6, batch=3)
    assert loaded.kwargs["input_ids"].shape == (3, 6)
    assert loaded.kwargs["input_ids"].flatten().tolist()[:6] == [4, 5, 6, 7, 4, 5]


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("one two")
    with pytest.raises(Problem) as caught:
        load(str(tmp_path), text=tmp_path / "text.txt")
    assert caught.value.code == "A117"
