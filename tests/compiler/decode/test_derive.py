"""Decoders with a cache: they give what the whole program gives, or say which operator stands in
the way."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.caches import Ring
from attnopt.compiler.decode.state import State
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from tests.programs import rewritten
from tests.tolerance import assert_close
from tests.zoo.survey import ALL, read

STEPS = 128
CASES = (
    "Llama", "Llama, padded", "Llama 4 (text)", "Qwen3", "Qwen3-MoE", "Mistral", "Gemma 2",
    "Gemma 3", "Phi-3", "GPT-2", "GPT-Neo", "GPT-NeoX", "OPT", "Falcon, new decoder",
    "Falcon, ALiBi", "BLOOM (ALiBi)", "MPT (ALiBi)", "DeepSeek-V2 (MLA)", "GPT-OSS (sinks)",
    "x-transformers rotary", "of no library",
)  # fmt: skip


@lru_cache
def zoo(name: str, double: bool = True) -> Program:
    """A random tiny model with the exact rewrites, in float64 where it is tried in that."""
    if name == "of no library":
        return traced(Small(""), input_ids=torch.randint(0, 50, (2, 12)))
    (architecture,) = [a for a in ALL if a.name == name]
    architecture = replace(architecture, double=architecture.double and double)
    try:
        _, program = read(architecture, architecture.spellings[0])
    except ImportError as missing:
        pytest.skip(f"{missing.name} is not installed")
    return rewritten(program)


def traced(model: nn.Module, **inputs: Tensor) -> Program:
    torch.manual_seed(0)
    return rewritten(raise_program(trace(Loaded(model.eval(), None, (), inputs, "m", "callable"))))


def whole(program: Program, decoder: Decoder, *inputs: Tensor) -> Tensor:
    """The logits of the program itself."""
    names = (*decoder.split.tokens, *decoder.split.masks)
    with torch.no_grad():
        out = program(**dict(zip(names, inputs, strict=True)))
    return next(x for x in pytree.tree_leaves(out) if isinstance(x, Tensor))


def singly(decoder: Decoder, state: State, ids: Tensor) -> list[Tensor]:
    """The logits of the tokens that the state has not read yet, one by one."""
    return [decoder.step(state, ids[:, at : at + 1]) for at in range(state.length, ids.shape[1])]


@pytest.mark.parametrize("name", CASES)
def test_steps_give_what_the_whole_gives(name: str) -> None:
    """In float32; `derive` itself compares in float64."""
    program = zoo(name, double=False)
    decoder = derive(program)
    prompt = 7
    ids = torch.randint(3, 50, (2, prompt + STEPS), generator=torch.Generator().manual_seed(0))
    masks = [torch.ones_like(ids) for _ in decoder.split.masks]
    expected = whole(program, decoder, ids, *masks)
    state = decoder.state(2, ids.shape[1])
    found = torch.cat([decoder.prefill(state, ids[:, :prompt]), *singly(decoder, state, ids)], 1)

    assert expected.dtype == torch.float32
    assert float((found - expected).abs().max()) <= 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", ["Llama, padded", "Mistral", "GPT-OSS (sinks)", "MPT (ALiBi)"])
@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_a_prompt_in_chunks(name: str, chunk: int) -> None:
    program = zoo(name)
    decoder = derive(program, check=False)
    ids = torch.randint(3, 60, (3, 23))
    masks = [torch.ones_like(ids) for _ in decoder.split.masks]
    state = decoder.state(3, 23)
    made = [decoder.step(state, ids[:, at : at + chunk]) for at in range(0, 23, chunk)]
    expected = whole(program, decoder, ids, *masks)
    assert_close(torch.cat(made, 1).float(), expected.float())


def test_left_padding() -> None:
    program = zoo("Llama, padded")
    decoder = derive(program, check=False)
    ids = torch.randint(3, 60, (3, 16))
    keep = torch.ones_like(ids)
    keep[0, :5], keep[2, :1] = 0, 0
    state = decoder.state(3, 16, {decoder.split.masks[0]: keep[:, :10]})
    made = [decoder.prefill(state, ids[:, :10]), *singly(decoder, state, ids)]
    expected = whole(program, decoder, ids, keep)
    real = keep.bool()
    assert_close(torch.cat(made, 1)[real], expected[real])


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_taking_tokens_back(name: str) -> None:
    program = zoo(name)
    decoder = derive(program, slack=4, check=False)
    ids, other = torch.randint(3, 60, (2, 2, 20))
    state = decoder.state(2, 20)
    decoder.prefill(state, other[:, :10])
    decoder.step(state, other[:, 10:14])
    decoder.rewind(state, 10)
    joined = torch.cat((other[:, :10], ids[:, 10:]), 1)
    made = singly(decoder, state, joined)
    expected = whole(program, decoder, joined)[:, 10:]
    assert_close(torch.cat(made, 1), expected)


def test_a_ring_takes_back_no_more_than_its_slack() -> None:
    decoder = derive(zoo("Mistral"), slack=2, check=False)
    state = decoder.state(1, 20)
    decoder.prefill(state, torch.randint(3, 60, (1, 12)))
    with pytest.raises(Problem, match="cannot go back to 9") as caught:
        decoder.rewind(state, 9)
    assert caught.value.code == "A705"
    decoder.rewind(state, 10)
    assert state.length == 10
    with pytest.raises(Problem, match="cannot go back to 9"):  # nor in two steps
        decoder.rewind(state, 9)
    with pytest.raises(Problem, match="cannot go back to 11"):
        decoder.rewind(state, 11)


def test_a_prompt_needs_an_empty_state() -> None:
    decoder = derive(zoo("Mistral"), check=False)
    state = decoder.state(1, 20)
    decoder.prefill(state, torch.randint(3, 60, (1, 5)))
    with pytest.raises(Problem, match="holds 5 tokens"):
        decoder.prefill(state, torch.randint(3, 60, (1, 5)))


def test_a_window_keeps_no_more_than_it_reads() -> None:
    decoder = derive(zoo("Mistral"), check=False)
    state = decoder.state(1, 100)
    assert all(isinstance(cache, Ring) for cache in decoder.caches.values())
    assert [tuple(k.shape) for k, _ in state.caches] == [(1, 2, 6, 16)] * 2
    assert state.bytes == 2 * 2 * 2 * 6 * 16 * 8
    assert decoder.bytes_per_token() == 2 * 2 * 2 * 16 * 8


def test_rows_in_another_order() -> None:
    program = zoo("Llama, padded")
    decoder = derive(program, check=False)
    ids = torch.randint(3, 60, (3, 12))
    keep = torch.ones_like(ids)
    keep[1, :4] = 0
    name = decoder.split.masks[0]
    state = decoder.state(3, 12, {name: keep[:, :8]})
    decoder.prefill(state, ids[:, :8])
    rows = torch.tensor([1, 1, 2])
    decoder.reorder(state, rows)
    mixed = torch.cat((ids[rows, :8], ids[:, 8:]), 1)
    made = decoder.step(state, mixed[:, 8:])
    expected = whole(program, decoder, mixed, keep[rows])[:, 8:]
    assert_close(made, expected)


@pytest.mark.parametrize("name", CASES)
def test_the_last_logits_alone(name: str) -> None:
    decoder = derive(zoo(name), check=False)
    ids = torch.randint(3, 50, (2, 9))
    every, last = (decoder.state(2, 9) for _ in range(2))
    for part in (ids[:, :6], ids[:, 6:]):
        wanted = decoder.step(every, part)
        assert_close(decoder.step(last, part, last=True), wanted[:, -1:])


class Small(nn.Module):
    """One causal attention, and a mix of tokens besides."""

    def __init__(self, mix: str) -> None:
        super().__init__()
        self.mix = mix
        self.embed = nn.Embedding(50, 32)
        self.register_buffer("positions", torch.randn(20, 32))
        self.qkv, self.out, self.head = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 50)
        if mix == "convolved":
            self.convolution = nn.Conv1d(32, 32, 3, padding=2, groups=32)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.mix == "convolved":
            x = x + self.convolution(x.mT)[..., : x.shape[1]].mT
        if self.mix == "mean":
            x = x + x.mean(1, keepdim=True)
        if self.mix == "length":
            at = torch.arange(x.shape[1])
            x = x + torch.sin(6 * at / x.shape[1])[:, None]
        if self.mix == "table":
            x = x + self.positions[: x.shape[1]]
        if self.mix == "cumsum":
            x = x + x.cumsum(1)
        shape = (*x.shape[:2], 3, 4, 8)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        causal = self.mix != "both ways"
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        if self.mix == "head":
            return self.head(x.mean(1))
        return self.head(x)


@pytest.mark.parametrize(
    ("mix", "code", "told"),
    [
        ("both ways", "A703", "attention_default"),
        ("mean", "A703", "mean"),
        ("cumsum", "A706", "cumsum"),
        ("length", "A706", "add"),
        ("head", "A701", "no logits"),
    ],
)
def test_what_cannot_be_cached_is_named(mix: str, code: str, told: str) -> None:
    program = traced(Small(mix), input_ids=torch.randint(0, 50, (2, 12)))
    with pytest.raises(Problem) as caught:
        derive(program)
    assert caught.value.code == code
    assert told in f"{caught.value.what} {caught.value.why}"
    if code != "A701":
        assert "test_derive.py:" in caught.value.where


def test_a_small_causal_model_can_be() -> None:
    program = traced(Small(""), input_ids=torch.randint(0, 50, (2, 12)))
    assert derive(program).bytes_per_token() == 2 * 32 * 4


def test_an_encoder_is_refused() -> None:
    (architecture,) = [a for a in ALL if a.name == "BERT"]
    _, program = read(architecture, "sdpa")
    with pytest.raises(Problem) as caught:
        derive(rewritten(program))
    assert caught.value.code in ("A701", "A703")


def test_more_tokens_than_fit() -> None:
    decoder = derive(zoo("Llama"), check=False)
    state = decoder.state(1, 4)
    decoder.prefill(state, torch.randint(3, 60, (1, 3)))
    with pytest.raises(Problem, match="do not fit into 4"):
        decoder.step(state, torch.randint(3, 60, (1, 2)))
    assert state.length == 3


def test_more_tokens_than_positions() -> None:
    decoder = derive(zoo("GPT-2"), check=False)
    with pytest.raises(Problem, match="no positions for 1000 tokens"):
        decoder.state(1, 1000)


def test_an_example_of_equal_tokens_hides_nothing() -> None:
    program = traced(Small("both ways"), input_ids=torch.ones(2, 12, dtype=torch.int64))
    with pytest.raises(Problem) as caught:
        derive(program)
    assert caught.value.code == "A703"


def test_a_table_of_fewer_positions() -> None:
    decoder = derive(traced(Small("table"), input_ids=torch.randint(0, 50, (2, 12))))
    assert decoder.state(1, 20).capacity == 20
    with pytest.raises(Problem, match="no positions for 21 tokens"):
        decoder.state(1, 21)


class Masked(nn.Module):
    """One causal attention with a mask `[batch, seq]` that is True at padding."""

    def __init__(self) -> None:
        super().__init__()
        self.small = Small("")

    def forward(self, input_ids: Tensor, key_padding_mask: Tensor) -> Tensor:
        x = self.small.embed(input_ids)
        q, k, v = self.small.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        keep = keep & ~key_padding_mask[:, None, None, :]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return self.small.head(x + self.small.out(y.transpose(1, 2).reshape(x.shape)))


def test_a_mask_that_is_true_at_padding() -> None:
    ids = torch.randint(0, 50, (2, 12))
    hidden = torch.zeros(2, 12, dtype=torch.bool)
    hidden[0, :3] = True
    program = traced(Masked(), input_ids=ids, key_padding_mask=hidden)
    decoder = derive(program)
    state = decoder.state(2, 12, decoder.masks((~hidden[:, :8]).long()))
    made = [decoder.prefill(state, ids[:, :8]), *singly(decoder, state, ids)]
    with torch.no_grad():
        expected = program(input_ids=ids, key_padding_mask=hidden)
    assert_close(torch.cat(made, 1)[~hidden], expected[~hidden])


def test_a_mask_of_another_kind_is_refused() -> None:
    class Additive(Masked):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.small.embed(input_ids)
            q, k, v = self.small.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
            return self.small.head(x + self.small.out(y.transpose(1, 2).reshape(x.shape)))

    causal = torch.full((12, 12), float("-inf")).triu(1).expand(2, 1, 12, 12).contiguous()
    program = traced(Additive(), input_ids=torch.randint(0, 50, (2, 12)), attention_mask=causal)
    with pytest.raises(Problem) as caught:
        derive(program)
    assert caught.value.code in ("A701", "A702")


def test_tokens_that_do_not_fit_the_state() -> None:
    decoder = derive(zoo("Llama"), check=False)
    state = decoder.state(2, 8)
    for tokens in ((torch.ones(1, 3).long(),), (), (torch.ones(2, 0).long(),)):
        with pytest.raises(Problem) as caught:
            decoder.prefill(state, *tokens)
        assert caught.value.code == "A707"
    assert state.length == 0
