"""Prompts padded on the left, for models that were traced without a mask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.decode import derive
from attnopt.compiler.decode.draft import Draft, draft_without
from attnopt.compiler.decode.generate import Generation, generate
from attnopt.compiler.decode.hf import as_transformers
from attnopt.compiler.decode.speculate import Tally, generate_speculatively
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.source import load
from attnopt.compiler.raising import raise_program
from attnopt.compiler.spec import Mask, parse_spec
from attnopt.compiler.trace import trace
from tests.compiler.decode.test_derive import traced, zoo
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
    assert caught.value.code == "A707" and "not their distances" in caught.value.why


@pytest.mark.parametrize("name", ["GPT-2", "GPT-Neo"])
def test_drafts_guess_padded_prompts(name: str) -> None:
    """Also where a draft makes the decoder keep more of its windows."""
    decoder = derive(zoo(name), check=False)
    ids, keep = prompts()
    expected = generate(decoder, ids, HOW, keep)
    for skipped in ("b0.mlp", "b1.attention"):
        draft = draft_without(decoder, [skipped], 3)
        assert torch.equal(generate_speculatively(decoder, draft, ids, HOW, keep), expected)
    tally = Tally()
    same = Draft(decoder, (), 3)
    assert torch.equal(generate_speculatively(decoder, same, ids, HOW, keep, tally), expected)
    assert tally.acceptance == 1.0


def test_windows_that_keep_the_first_columns_are_refused() -> None:
    program = zoo("Llama").copy()
    for node in program.attentions():
        spec = parse_spec(str(node.args[4]))
        node.update_arg(4, spec.with_(mask=Mask("window", left=64, sink=4)).text)
    decoder = derive(program, check=False)
    with pytest.raises(Problem, match="takes no padding") as caught:
        decoder.taking(prompts()[1])
    assert "first columns" in caught.value.why


def test_padding_between_tokens_is_refused() -> None:
    decoder = derive(zoo("Llama"), check=False)
    ids, keep = prompts()
    keep[1, 3] = 0
    with pytest.raises(Problem, match="between tokens"):
        generate(decoder, ids, HOW, keep)


def test_a_compiled_decoder_compiles_the_one_for_padding() -> None:
    decoder = derive(zoo("Llama", double=False), check=False)
    _, keep = prompts()
    before = decoder.taking(keep)
    decoder.compile()
    assert decoder.taking(keep) is not before and decoder.taking(keep)._single is not None


class Tables(nn.Module):
    """Rotary positions from tables `[1, S, dim]` that meet `[batch, heads, S, dim]`; a mask that is
    taken and not read."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.heads = heads
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.qkv = nn.Linear(32, 96)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in self.qkv(self.embed(input_ids)).chunk(3, -1)
        )
        half = q.shape[-1] // 2
        angles = torch.arange(q.shape[2])[:, None] * 10.0 ** -torch.arange(half)
        angles = torch.cat((angles, angles), -1)[None]
        cos, sin = angles.cos(), angles.sin()
        q, k = (x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin for x in (q, k))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(2))


def test_tables_that_do_not_begin_with_the_batch_and_a_mask_that_is_not_read() -> None:
    ids, keep = prompts()
    given = {"input_ids": ids[:2, :12], "attention_mask": keep[:2, :12]}
    decoder = derive(traced(Tables(), **given), check=False)
    made = generate(decoder, ids, HOW, keep)
    for row, columns in enumerate(PADDED):
        alone = generate(decoder, ids[row : row + 1, columns:], HOW)
        assert torch.equal(made[row, columns:], alone[0])


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
