"""Caches of latents: found in models that have them, exact, and only where they are smaller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.caches import Contiguous
from attnopt.compiler.decode.latents import Latent
from attnopt.compiler.decode.phase_cost import decoding
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Program
from tests.compiler.decode.test_derive import singly, traced, whole, zoo
from tests.tolerance import assert_close

WIDTH, HEADS, DIM = 32, 4, 8


class Narrow(nn.Module):
    """A decoder whose keys and values are made of `rank` numbers per token; `twist` says how else
    than in the plain way."""

    def __init__(self, rank: int, twist: str = "") -> None:
        super().__init__()
        self.twist = twist
        self.embed = nn.Embedding(50, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.down = nn.Linear(WIDTH, rank)
        self.up = nn.Linear(rank, 2 * HEADS * DIM)
        self.key_norm = nn.LayerNorm(DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH)
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        h = self.norm(x)
        batch, seq, _ = h.shape
        q = self.q(h).view(batch, seq, HEADS, DIM).transpose(1, 2)
        up = self.up(self.down(h)).view(batch, seq, HEADS, 2 * DIM).transpose(1, 2)
        k, v = up.split(DIM, -1)
        if self.twist == "norm":
            k = self.key_norm(k)
        if self.twist == "positions":
            turn = torch.arange(seq, dtype=h.dtype)[:, None] * 0.1
            k = k * turn.cos()
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        made: Tensor = self.head(x + self.out(a.transpose(1, 2).flatten(2)))
        return made


def narrow(rank: int, twist: str = "") -> Program:
    torch.manual_seed(0)
    return traced(Narrow(rank, twist), input_ids=torch.randint(0, 50, (2, 12)))


def the_cache(decoder: Decoder) -> Any:
    return next(iter(decoder.caches.values()))


@pytest.mark.parametrize("name", ["DeepSeek-V2 (MLA)", "DeepSeek-V3 (MLA)"])
def test_a_model_that_was_trained_with_latents_keeps_them(name: str) -> None:
    decoder = derive(zoo(name), check=False)
    assert all(isinstance(cache, Latent) for cache in decoder.caches.values())
    assert decoder.bytes_per_token() == 2 * (16 + 8) * 4  # layers x (latent + rotary) x float32
    assert decoding(decoder.program).cache_bytes_per_token == decoder.bytes_per_token()
    state = decoder.state(3, 10)
    assert state.bytes == 3 * 11 * decoder.bytes_per_token()


@pytest.mark.parametrize("chunk", [1, 3])
def test_steps_and_chunks_are_exact(chunk: int) -> None:
    program = narrow(10)
    decoder = derive(program)
    assert isinstance(the_cache(decoder), Latent)
    ids = torch.randint(0, 50, (2, 20))
    state = decoder.state(2, 24)
    made = [decoder.step(state, ids[:, at : at + chunk]) for at in range(0, 20, chunk)]
    assert_close(torch.cat(made, 1), whole(program, decoder, ids))
    decoder.rewind(state, 8)
    decoder.reorder(state, torch.tensor([1, 1]))
    decoder.grow(state, 40)
    joined = torch.cat((ids[1:, :8].expand(2, 8), torch.randint(0, 50, (2, 30))), 1)
    expected = whole(program, decoder, joined)[:, 8:]
    assert_close(torch.cat(singly(decoder, state, joined), 1), expected)


def test_the_check_runs_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Latent.attend
    monkeypatch.setattr(Latent, "attend", lambda *given: 2 * attend(*given))
    with pytest.raises(Problem) as caught:
        derive(narrow(10))
    assert caught.value.code == "A706"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tells_a_map_from_what_resembles_one(dtype: torch.dtype) -> None:
    def cache(twist: str) -> Any:
        torch.manual_seed(0)
        model = Narrow(10, twist).to(dtype)
        program = traced(model, input_ids=torch.randint(0, 50, (2, 12)))
        return the_cache(derive(program, check=False))

    assert isinstance(cache(""), Latent) and cache("").up_k.dtype == dtype
    assert isinstance(cache("positions"), Contiguous)


@pytest.mark.parametrize(
    "rank, twist",
    [(64, ""), (10, "norm"), (10, "positions")],
    ids=["as wide as keys and values", "a norm on the keys", "keys that know their position"],
)
def test_what_is_no_smaller_or_no_map_of_the_latent_is_kept_whole(rank: int, twist: str) -> None:
    decoder = derive(narrow(rank, twist))
    assert isinstance(the_cache(decoder), Contiguous)


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_the_stream_of_a_model_is_no_latent(name: str) -> None:
    decoder = derive(zoo(name), check=False)
    assert all(isinstance(cache, Contiguous) for cache in decoder.caches.values())
