"""Prompts padded on the left, for models that were traced without a mask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from attnopt.compiler.decode import derive
from attnopt.compiler.decode.draft import draft_without
from attnopt.compiler.decode.generate import Generation, generate
from attnopt.compiler.decode.hf import as_transformers
from attnopt.compiler.decode.speculate import generate_speculatively
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.source import load
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from tests.compiler.decode.test_derive import zoo
from tests.programs import rewritten

HOW = Generation(max_new_tokens=10)
PADDED = (5, 0, 1)


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of other lengths, with tokens of no meaning before them."""
    ids = torch.randint(3, 50, (3, 14), generator=torch.Generator().manual_seed(1))
    keep = torch.ones_like(ids)
    for row, columns in enumerate(PADDED):
        keep[row, :columns] = 0
    return ids, keep


@pytest.mark.parametrize(
    "name",
    [
        "Llama", "Mistral", "GPT-2", "OPT", "BLOOM (ALiBi)", "Falcon, ALiBi", "DeepSeek-V2 (MLA)",
        "GPT-OSS (sinks)", "of no library",
    ],
)  # fmt: skip
def test_padded_prompts_give_the_tokens_of_each_alone(name: str) -> None:
    decoder = derive(zoo(name), check=False)
    assert not decoder.split.masks
    ids, keep = prompts()
    made = generate(decoder, ids, HOW, keep)
    for row, columns in enumerate(PADDED):
        alone = generate(decoder, ids[row : row + 1, columns:], HOW)
        assert torch.equal(made[row, columns:], alone[0])


def test_it_is_made_once_and_only_for_padding() -> None:
    decoder = derive(zoo("Llama"), check=False)
    _, keep = prompts()
    assert decoder.taking(None) is decoder.taking(torch.ones_like(keep)) is decoder
    padded = decoder.taking(keep)
    assert padded is not decoder and decoder.taking(keep) is padded is padded.taking(keep)
    assert padded.bytes_per_token() == decoder.bytes_per_token()


def test_positions_that_no_shift_mends_are_refused() -> None:
    """Chunks of keys that are counted from the first column."""
    decoder = derive(zoo("Llama 4 (text)"), check=False)
    ids, keep = prompts()
    with pytest.raises(Problem, match="takes no padding") as caught:
        generate(decoder, ids, HOW, keep)
    assert caught.value.code == "A707" and "rms" in caught.value.why


def test_drafts_guess_padded_prompts() -> None:
    decoder = derive(zoo("GPT-2"), check=False)
    ids, keep = prompts()
    for skipped in ("b0.mlp", "b1.attention"):
        draft = draft_without(decoder, [skipped], 3)
        made = generate_speculatively(decoder, draft, ids, HOW, keep)
        assert torch.equal(made, generate(decoder, ids, HOW, keep))


def test_transformers_gives_the_tokens_of_its_own_model(tmp_path: Path) -> None:
    """Of a folder, which is traced from `input_ids` alone, with positions that are learned."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    sizes = {"vocab_size": 50, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1}
    config = transformers.GPT2Config(**sizes, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    decoder = derive(rewritten(raise_program(trace(load(str(tmp_path))))))
    ids, keep = prompts()
    made = [
        one.generate(ids, attention_mask=keep, max_new_tokens=12, do_sample=False, num_beams=2,
                     pad_token_id=0, eos_token_id=None)
        for one in (model, as_transformers(decoder, config))
    ]  # fmt: skip
    assert torch.equal(*made)
