"""A derived decoder inside transformers: its `generate()` in several ways, and a pipeline."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch

from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.hf import ROOM, as_transformers
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from tests.compiler.decode.test_generate import decoder, llama, prompts
from tests.families import Decoder as Plain
from tests.programs import rewritten
from tests.tolerance import assert_close
from tests.tree import ROOT

transformers = pytest.importorskip("transformers")
PYLM = ROOT / "examples" / "models" / "pylm"


@lru_cache(maxsize=1)
def made() -> Any:
    return as_transformers(decoder(), llama()[0].config)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
        {"do_sample": True, "top_k": 7},
        {"do_sample": False, "num_return_sequences": 2, "num_beams": 2},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "prefill_chunk_size": 3},
    ],
)
def test_generate_gives_the_tokens_of_the_model(how: dict[str, Any]) -> None:
    ids, keep = prompts()
    if "prompt_lookup_num_tokens" in how:  # transformers takes one prompt there
        ids, keep = ids[2:], keep[2:]
    made_of = []
    for model in (llama()[0], made()):
        torch.manual_seed(4)
        made_of.append(model.generate(
            ids, attention_mask=keep, max_new_tokens=24, pad_token_id=0, eos_token_id=None, **how
        ))  # fmt: skip
    assert torch.equal(*made_of)


def test_more_tokens_than_a_state_begins_with() -> None:
    ids, _ = prompts()
    tokens = [
        model.generate(ids[2:], attention_mask=torch.ones_like(ids[2:]), max_new_tokens=ROOM + 20,
                       do_sample=False, pad_token_id=0, eos_token_id=None)
        for model in (llama()[0], made())
    ]  # fmt: skip
    assert tokens[0].shape[1] == 9 + ROOM + 20
    assert torch.equal(*tokens)


@lru_cache(maxsize=1)
def pylm() -> tuple[Any, Decoder]:
    hf = transformers.AutoModelForCausalLM.from_pretrained(PYLM, dtype=torch.float32).eval()
    plain = Plain(hf).eval()
    inputs = {"input_ids": torch.randint(3, 1000, (2, 32))}
    loaded = Loaded(plain, None, (), inputs, "pylm", "hf", root_prefix="hf.")
    return hf, derive(rewritten(raise_program(trace(loaded))))


def test_a_real_model_in_float32() -> None:
    hf, derived = pylm()
    expected = hf.generate(torch.arange(3, 90)[None], max_new_tokens=128, do_sample=False)
    with torch.no_grad():
        logits = hf(expected).logits
    state = derived.state(1, expected.shape[1])
    found = [derived.prefill(state, expected[:, :87])]
    found += [derived.step(state, expected[:, at : at + 1]) for at in range(87, expected.shape[1])]
    made = torch.cat(found, 1)
    assert expected.shape[1] > 200
    assert float((made - logits).abs().max()) <= 1e-4
    assert torch.equal(made.argmax(-1), logits.argmax(-1))


def test_a_pipeline() -> None:
    hf, derived = pylm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(PYLM)
    texts = [
        transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)(
            "def main():\n", max_new_tokens=40, do_sample=False
        )[0]["generated_text"]
        for model in (hf, as_transformers(derived, PYLM))
    ]
    assert len(texts[0]) > 30
    assert texts[0] == texts[1]


def test_padding_for_a_model_that_was_traced_without() -> None:
    hf, derived = pylm()
    ids, keep = prompts()
    tokens = [
        model.generate(ids, attention_mask=keep, max_new_tokens=30, do_sample=False)
        for model in (hf, as_transformers(derived, PYLM))
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("kept", [0, 1, 2, 100, torch.tensor([0, 4]), torch.tensor([3])])
def test_logits_of_the_positions_that_are_asked_for(kept: Any) -> None:
    ids, _ = prompts()
    theirs, mine = (
        model(ids, use_cache=False, logits_to_keep=kept).logits for model in (llama()[0], made())
    )
    assert mine.shape == theirs.shape
    assert_close(mine, theirs)


def test_a_tuple_where_one_is_asked_for() -> None:
    ids, _ = prompts()
    logits, past = made()(ids, return_dict=False)
    assert_close(logits, made()(ids).logits)
    assert past.get_seq_length() == ids.shape[1]
    assert len(made()(ids, return_dict=False, use_cache=False)) == 1
    config = copy.deepcopy(llama()[0].config)
    config.return_dict = False
    plain = as_transformers(decoder(), config)
    assert isinstance(plain(ids), tuple)
    assert plain(ids, return_dict=True).logits.shape == logits.shape


def test_the_embeddings_are_those_of_the_model() -> None:
    ids, _ = prompts()
    table = made().get_input_embeddings()
    assert torch.equal(table(ids), llama()[0].get_input_embeddings()(ids))
    for change in (
        lambda: made().set_input_embeddings(table),
        lambda: made().resize_token_embeddings(8),
    ):
        with pytest.raises(Problem, match="no use for other embeddings"):
            change()


@pytest.mark.parametrize("more", [{"labels": 1}, {"output_hidden_states": True}])
def test_what_the_decoder_does_not_give(more: dict[str, Any]) -> None:
    with pytest.raises(Problem, match="has no use for"):
        made()(prompts()[0], **more)
    with pytest.raises(Problem, match="DynamicCache"):
        made()(prompts()[0], past_key_values=transformers.DynamicCache())
