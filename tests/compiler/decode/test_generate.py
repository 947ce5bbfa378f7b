"""Generating: the tokens of `transformers`, and draws that follow the probabilities."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.artifact import load, save
from attnopt.compiler.decode import Decoder, derive
from attnopt.compiler.decode.generate import Generation, generate, stream
from attnopt.compiler.decode.sampling import Sampling, most_likely
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.plan import Plan
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from tests.families import VOCABULARY
from tests.programs import rewritten

transformers = pytest.importorskip("transformers")


class Masked(nn.Module):
    """A model of `transformers` that takes a mask and positions."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        made = self.hf(input_ids=input_ids, attention_mask=attention_mask,
                       position_ids=position_ids, use_cache=False)  # fmt: skip
        logits: Tensor = made.logits
        return logits


@lru_cache(maxsize=2)
def llama() -> tuple[Any, Program]:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(3)
    hf = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, VOCABULARY, (2, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
              "position_ids": torch.arange(12).expand(2, 12).contiguous()}  # fmt: skip
    loaded = Loaded(Masked(hf).eval(), None, (), inputs, "llama", "hf", root_prefix="hf.")
    return hf, rewritten(raise_program(trace(loaded)))


@lru_cache(maxsize=1)
def decoder() -> Decoder:
    return derive(llama()[1])


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of other lengths, padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    keep = torch.ones_like(ids)
    keep[0, :4], keep[1, :1] = 0, 0
    return ids * keep, keep


@pytest.mark.parametrize("chunk", [None, 4])
def test_greedy_tokens_are_those_of_transformers(chunk: int | None) -> None:
    ids, keep = prompts()
    expected = llama()[0].generate(
        ids, attention_mask=keep, max_new_tokens=40, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    how = Generation(max_new_tokens=40, prefill_chunk=chunk)
    assert torch.equal(generate(decoder(), ids, how, keep), expected)


def test_rows_end_and_are_filled() -> None:
    ids, keep = prompts()
    plain = generate(decoder(), ids, Generation(max_new_tokens=30), keep)[:, 9:]
    ends = [int(plain[0, 3]), int(plain[1, 7]), int(plain[2, 5])]
    hf = llama()[0].generate(
        ids, attention_mask=keep, max_new_tokens=30, do_sample=False, pad_token_id=0,
        eos_token_id=ends,
    )  # fmt: skip
    how = Generation(max_new_tokens=30, eos_token_id=ends, pad_token_id=0)
    made = generate(decoder(), ids, how, keep)
    assert made.shape[1] < 9 + 30
    assert torch.equal(made, hf)


def test_columns_come_one_by_one() -> None:
    ids, keep = prompts()
    how = Generation(max_new_tokens=6)
    columns = []
    source = stream(decoder(), ids, how, keep)
    columns.append(next(source))
    columns += list(source)
    made = generate(decoder(), ids, how, keep)
    assert torch.equal(torch.stack(columns, 1), made[:, 9:])


def test_draws_repeat_with_their_seed() -> None:
    ids, keep = prompts()
    how = Generation(max_new_tokens=12, do_sample=True, temperature=1.3, top_k=20, top_p=0.9,
                     seed=7)  # fmt: skip
    first, second = (generate(decoder(), ids, how, keep) for _ in range(2))
    other = generate(decoder(), ids, Generation(max_new_tokens=12, do_sample=True, seed=8), keep)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "how",
    [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6},
     {"temperature": 1.7, "top_k": 12, "top_p": 0.8}],
)  # fmt: skip
def test_probabilities_are_those_of_transformers(how: dict[str, Any]) -> None:
    from transformers.generation import logits_process as lp

    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3
    expected = logits.clone()
    for name, made in (("temperature", lp.TemperatureLogitsWarper), ("top_k", lp.TopKLogitsWarper),
                       ("top_p", lp.TopPLogitsWarper)):  # fmt: skip
        if name in how:
            expected = made(how[name])(None, expected)
    found = Sampling(do_sample=True, **how).probabilities(logits)
    torch.testing.assert_close(found, expected.softmax(-1))


def test_draws_follow_the_probabilities() -> None:
    """A chi-squared test over a small vocabulary: 5 cells, so 4 degrees of freedom, whose 99.9%
    quantile is 18.5."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]])
    how = Sampling(do_sample=True, seed=0)
    generator = how.generator(torch.device("cpu"))
    drawn = how.next(logits.expand(20_000, 5), generator)
    seen = drawn.bincount(minlength=5).double()
    wanted = how.probabilities(logits)[0].double() * 20_000
    assert float(((seen - wanted).square() / wanted).sum()) < 18.5


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
    ],
)
def test_settings_that_make_no_sense(how: dict[str, Any], told: str) -> None:
    with pytest.raises(Problem, match=told) as caught:
        Generation(**how)
    assert caught.value.code == "A707"


@pytest.mark.parametrize(
    ("ids", "keep", "told"),
    [
        (torch.zeros(2, 3), None, "whole numbers"),
        (torch.ones(2, 3).long(), torch.ones(2, 4), "differ in shape"),
        (torch.full((2, 3), VOCABULARY), None, "hold 100 to 100"),
        ([[1, 2]], None, "is a tensor, not list"),
        (torch.ones(2, 3).long(), torch.tensor([[1, 1, 0], [1, 1, 1]]), "is padding"),
    ],
)
def test_prompts_that_do_not_fit(ids: Tensor, keep: Tensor | None, told: str) -> None:
    with pytest.raises(Problem, match=told):
        generate(decoder(), ids, Generation(), keep)


class _Said:
    def files(self) -> dict[str, bytes]:
        return {"report.json": b"{}"}

    def evidence(self) -> dict[str, Any]:
        return {}


def test_a_saved_run_generates(tmp_path: Path) -> None:
    hf, program = llama()
    save(tmp_path / "run", program, Plan(), _Said())
    model = load(tmp_path / "run")
    ids, keep = prompts()
    expected = hf.generate(ids, attention_mask=keep, max_new_tokens=15, do_sample=False,
                           pad_token_id=0, eos_token_id=None)  # fmt: skip
    assert torch.equal(model.generate(ids, keep, max_new_tokens=15), expected)
    assert model._plan["decode"] == {"cache_bytes_per_token": 2 * 2 * 2 * 16 * 4}
    assert (tmp_path / "run" / "decode.pt2").stat().st_size < 1_500_000
    with pytest.raises(Problem, match="no argument `beams`"):
        model.generate(ids, keep, beams=4)


def test_a_saved_encoder_says_why_not(tmp_path: Path) -> None:
    from tests.zoo.survey import ALL, read

    (bert,) = [a for a in ALL if a.name == "BERT"]
    save(tmp_path / "run", read(bert, "sdpa")[1], Plan(), _Said())
    model = load(tmp_path / "run")
    with pytest.raises(Problem, match="cannot be decoded") as caught:
        model.generate(torch.ones(1, 4).long())
    assert caught.value.code == "A708" and caught.value.why


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 50), (1, 20_049), (2, 4, 5_017)])
def test_the_most_likely_token_is_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(most_likely(logits), logits.argmax(-1))  # of equal ones the first
    assert most_likely(logits).dtype == torch.int64
    logits[..., 7] = torch.nan
    logits[0, ..., 3] = torch.inf
    assert torch.equal(most_likely(logits), logits.argmax(-1))
    wide = logits.mT.contiguous().mT.requires_grad_()
    assert torch.equal(most_likely(wide), wide.argmax(-1))
