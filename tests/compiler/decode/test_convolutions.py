"""Decoders of models with causal convolutions along the sequence: each keeps its last inputs."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.draft import draft_without
from attnopt.compiler.decode.generate import Generation, generate
from attnopt.compiler.decode.speculate import generate_speculatively
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from tests.compiler.decode.test_derive import singly, traced, whole
from tests.tolerance import assert_close

CAUSAL = ("cut", "cut behind", "padded", "padded before", "zeros", "dilated", "mixed")
WIDTH, KERNEL, LENGTH = 16, 3, 23
PAST = {"dilated": 4}  # inputs that are kept; 2 elsewhere


class Convolved(nn.Module):
    """Two blocks of a convolution and a causal attention, in one spelling of the convolution."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.embed, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        groups, dilation = 4 if spelling == "mixed" else WIDTH, 2 if spelling == "dilated" else 1
        padding: str | int = 0
        if spelling in ("cut", "cut behind", "mixed", "dilated"):
            padding = (KERNEL - 1) * dilation
        self.convolutions = nn.ModuleList(
            nn.Conv1d(WIDTH, WIDTH, KERNEL, padding=1 if spelling == "centred" else padding,
                      dilation=dilation, groups=groups)
            for _ in range(2)
        )  # fmt: skip
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for convolution, qkv in zip(self.convolutions, self.qkv, strict=True):
            real = x
            if attention_mask is not None and self.spelling == "padded":
                real = x * attention_mask[:, :, None]
            x = x + self._convolved(convolution, real)
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1))
            mask = None
            if attention_mask is not None:
                causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
                mask = causal & (attention_mask[:, None, None, :] != 0)
            mixed = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None
            )
            x = x + mixed.transpose(1, 2).flatten(2)
        return self.head(x)

    def _convolved(self, convolution: nn.Module, x: Tensor) -> Tensor:
        length, past = x.shape[1], KERNEL - 1
        if self.spelling == "cut behind":
            return convolution(x.transpose(1, 2)).transpose(1, 2)[:, :-past]
        if self.spelling == "padded before":
            return convolution(nn.functional.pad(x, (0, 0, past, 0)).transpose(1, 2)).mT
        x = x.permute(0, 2, 1)
        if self.spelling == "padded":
            x = nn.functional.pad(x, (past, 0))
        if self.spelling == "zeros":
            x = torch.cat((x.new_zeros(x.shape[0], WIDTH, past), x), -1)
        made = convolution(x)
        return made[..., :length].permute(0, 2, 1)


@lru_cache
def program(spelling: str, masked: bool = False) -> Program:
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(0, 50, (2, 12))}
    if masked:
        inputs["attention_mask"] = torch.ones(2, 12, dtype=torch.int64)
        inputs["attention_mask"][0, :3] = 0
    return traced(Convolved(spelling), **inputs)


@lru_cache
def decoder(spelling: str, slack: int = 0, masked: bool = False) -> Decoder:
    return derive(program(spelling, masked), slack, check=False)


def ids(rows: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spelling", CAUSAL)
def test_steps_give_what_the_whole_gives(spelling: str) -> None:
    made = derive(program(spelling))
    assert [kept.reach for kept in made.convolutions.values()] == [PAST.get(spelling, 2)] * 2
    expected = whole(program(spelling), made, ids())
    for prompt in (1, 7):
        state = made.state(2, LENGTH)
        found = [made.prefill(state, ids()[:, :prompt]), *singly(made, state, ids())]
        assert_close(torch.cat(found, 1), expected)


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("chunk", [2, 5])
def test_a_prompt_in_chunks(chunk: int, slack: int) -> None:
    made = decoder("dilated", slack)
    state = made.state(2, LENGTH)
    found = [made.step(state, ids()[:, at : at + chunk]) for at in range(0, LENGTH, chunk)]
    assert_close(torch.cat(found, 1), whole(program("dilated"), made, ids()))


def test_what_is_kept_does_not_grow_with_tokens() -> None:
    made = decoder("cut")
    short, long = made.state(3, 10), made.state(3, 100)
    inputs = 2 * (KERNEL - 1) * WIDTH * 4
    assert made.convolution_bytes() == inputs
    assert made.bytes_per_token() == 2 * 2 * WIDTH * 4
    assert short.bytes == 3 * (inputs + 11 * made.bytes_per_token())
    assert long.bytes - short.bytes == 3 * 90 * made.bytes_per_token()


def test_taking_tokens_back() -> None:
    made, other = decoder("padded", 4), ids(seed=2)
    state = made.state(2, LENGTH)
    made.prefill(state, other[:, :10])
    made.step(state, other[:, 10:14])
    made.rewind(state, 10)
    joined = torch.cat((other[:, :10], ids()[:, 10:]), 1)
    expected = whole(program("padded"), made, joined)[:, 10:]
    assert_close(torch.cat(singly(made, state, joined), 1), expected)


def test_no_more_is_taken_back_than_the_slack() -> None:
    made = decoder("padded", 2)
    state = made.state(2, LENGTH)
    made.prefill(state, ids()[:, :12])
    with pytest.raises(Problem, match="cannot go back to 9") as caught:
        made.rewind(state, 9)
    assert caught.value.code == "A705" and "convolution" in caught.value.why
    assert made.with_slack(2) is made and made.with_slack(3) is not made
    short = made.state(2, LENGTH)
    made.prefill(short, ids(seed=2)[:, :4])
    made.rewind(short, 0)  # nothing was overwritten, and nothing before the start is read
    expected = whole(program("padded"), made, ids())
    assert_close(torch.cat(singly(made, short, ids()), 1), expected)


@pytest.mark.parametrize("slack", [0, 3, 20])
def test_a_state_may_be_shorter_than_what_is_kept(slack: int) -> None:
    made = decoder("cut", slack)
    expected = whole(program("cut"), made, ids())
    for capacity in (2, 5):
        state = made.state(2, capacity)
        found = [made.prefill(state, ids()[:, :1]), *singly(made, state, ids()[:, :capacity])]
        assert_close(torch.cat(found, 1), expected[:, :capacity])


def test_rows_and_room_change() -> None:
    made, rows = decoder("cut", 1), torch.tensor([1, 1, 0])
    state = made.state(2, 2)  # fewer tokens than are kept
    made.prefill(state, ids()[:, :2])
    made.grow(state, LENGTH)
    made.step(state, ids()[:, 2:9])
    made.reorder(state, rows)
    expected = whole(program("cut"), made, ids()[rows])
    assert_close(made.step(state, ids()[rows, 9:]), expected[:, 9:])


def test_padding_that_the_model_keeps_out() -> None:
    made = decoder("padded", masked=True)
    keep = torch.ones(2, LENGTH, dtype=torch.int64)
    keep[1, :5] = 0
    state = made.state(2, LENGTH, made.masks(keep[:, :10]))
    found = [made.prefill(state, ids()[:, :10]), *singly(made, state, ids())]
    expected, real = whole(program("padded", True), made, ids(), keep), keep.bool()
    assert_close(torch.cat(found, 1)[real], expected[real])
    alone = whole(program("padded", True), made, ids()[1:, 5:], keep[1:, 5:])
    assert_close(torch.cat(found, 1)[1:, 5:], alone)


def test_padding_that_reaches_real_tokens_is_refused() -> None:
    made = decoder("cut", masked=True)
    keep = torch.ones(2, 10, dtype=torch.int64)
    made.state(2, LENGTH, made.masks(keep))
    keep[1, :5] = 0
    with pytest.raises(Problem, match="takes no padding") as caught:
        made.state(2, LENGTH, made.masks(keep))
    assert caught.value.code == "A707" and "convolutions read padded" in caught.value.why


def test_a_projection_behind_a_convolution_is_known_by_its_reason() -> None:
    class Behind(Convolved):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            q, k, v = self.qkv[0](self.embed(input_ids)).chunk(3, -1)
            q = self._convolved(self.convolutions[0], q)
            heads = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
            mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            return self.head(mixed.transpose(1, 2).flatten(2))

    (site,) = traced(Behind("cut"), input_ids=torch.randint(0, 50, (2, 12))).sites
    assert site.q is None and site.k is not None
    assert "the convolution `conv1d` stands behind" in site.missing["q"]


def test_a_convolution_that_looks_ahead_is_refused() -> None:
    with pytest.raises(Problem) as caught:
        derive(program("centred"))
    assert caught.value.code == "A703" and "conv1d" in caught.value.what


def test_a_draft_guesses_for_it() -> None:
    made = decoder("cut")
    how = Generation(max_new_tokens=9)
    draft = draft_without(made, ["b1.attention"], 3)
    assert len(draft.decoder.convolutions) == 2
    expected = generate(made, ids(1, 5), how)
    assert torch.equal(generate_speculatively(made, draft, ids(1, 5), how), expected)


def test_lfm2_of_transformers_and_its_padding() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Lfm2Config"):
        pytest.skip("this transformers has no LFM2")
    config = transformers.Lfm2Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"],
        block_multiple_of=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(config).eval()

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            said = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
            return said.logits

    keep = torch.ones(2, LENGTH, dtype=torch.int64)
    keep[0, :5] = 0
    inputs = {"input_ids": ids()[:, :12], "attention_mask": keep[:, :12]}
    read = raise_program(trace(Loaded(Logits().eval(), None, (), inputs, "lfm2", "callable")))
    made = derive(read)
    assert len(made.convolutions) == 1
    state = made.state(2, LENGTH, made.masks(keep[:, :10]))
    found = torch.cat([made.prefill(state, ids()[:, :10]), *singly(made, state, ids())], 1)
    with torch.no_grad():
        expected = model(input_ids=ids(), attention_mask=keep, use_cache=False).logits
    assert_close(found[keep.bool()], expected[keep.bool()])
