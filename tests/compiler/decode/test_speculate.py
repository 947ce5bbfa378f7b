"""Speculative decoding: the tokens of plain decoding, draws of the same distribution, and a draft
only where it pays."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.artifact import load, save
from attnopt.compiler.contract import Miss
from attnopt.compiler.decode import Decoder, derive, speculate
from attnopt.compiler.decode.draft import (
    LENGTHS,
    Draft,
    _batches,
    choose,
    draft_without,
    predicted_gain,
    removable,
    seconds,
)
from attnopt.compiler.decode.generate import Generation, generate
from attnopt.compiler.decode.sampling import Sampling
from attnopt.compiler.decode.speculate import Tally, generate_speculatively
from attnopt.compiler.errors import Problem
from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.plan import Plan
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from tests.compiler.decode.test_derive import zoo
from tests.programs import rewritten

WORDS = 4  # few enough to count every sequence of three
WARM = 5.0  # a temperature at which each of them comes up


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, 2, x.shape[2] // 2)
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        made: Tensor = x + self.down(torch.relu(self.up(self.norm2(x))))
        return made


class Model(nn.Module):
    """Blocks of which the last MLP, where there are several, adds nothing."""

    def __init__(self, words: int, blocks: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(words, 16), nn.Linear(16, words)
        self.blocks = nn.ModuleList(Block(16) for _ in range(blocks))
        for parameter in self.blocks[-1].down.parameters():
            nn.init.normal_(parameter) if blocks == 1 else nn.init.zeros_(parameter)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"logits": 2 * self.head(x)}


@lru_cache(maxsize=3)
def small(words: int = 40, blocks: int = 2) -> tuple[Program, Decoder]:
    torch.manual_seed(1)
    ids = torch.randint(0, words, (2, 12))
    loaded = Loaded(Model(words, blocks).eval(), None, (), {"input_ids": ids}, "m", "callable")
    program = rewritten(raise_program(trace(loaded)))
    return program, derive(program, check=False)


@pytest.mark.parametrize("name", ["Llama, padded", "Mistral"])
def test_greedy_tokens_are_those_of_plain_decoding(name: str) -> None:
    decoder = derive(zoo(name), check=False)
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    how = Generation(max_new_tokens=24)
    plain = generate(decoder, ids, how)
    for skipped, length in (("b1.mlp", 1), ("b0.attention", 3), ("b1.mlp", 7)):
        draft, tally = draft_without(decoder, [skipped], length), Tally()
        made = generate_speculatively(decoder, draft, ids, how, tally=tally)
        assert torch.equal(made, plain)
        assert tally.kept <= tally.guessed and tally.rounds + tally.kept == 24
        assert tally.kept > 0 and tally.rounds > 1  # some guesses were kept, and some rounds ended


def test_padded_rows_advance_together() -> None:
    decoder = derive(zoo("Llama, padded"), check=False)
    draft = draft_without(decoder, ["b1.mlp"], 3)
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(2))
    keep = torch.ones_like(ids)
    keep[0, :4], keep[1, :1] = 0, 0
    plain = generate(decoder, ids, Generation(max_new_tokens=20), keep)
    ends = [int(plain[0, 12]), int(plain[1, 16])]
    for how in (
        Generation(max_new_tokens=20, prefill_chunk=4),
        Generation(max_new_tokens=20, eos_token_id=ends, pad_token_id=0),
        Generation(max_new_tokens=1),
    ):
        made = generate_speculatively(decoder, draft, ids, how, keep)
        assert torch.equal(made, generate(decoder, ids, how, keep))


def test_a_prompt_of_one_token() -> None:
    decoder = small()[1]
    ids, how = torch.tensor([[3]]), Generation(max_new_tokens=9)
    draft = draft_without(decoder, ["b0.mlp"], 2)
    made = generate_speculatively(decoder, draft, ids, how)
    assert torch.equal(made, generate(decoder, ids, how))


def test_any_decoder_over_the_same_tokens_may_draft() -> None:
    decoder, other = small()[1], small(blocks=1)[1]
    ids, how, tally = torch.tensor([[3, 5, 7]]), Generation(max_new_tokens=12), Tally()
    made = generate_speculatively(decoder, Draft(other, (), 3), ids, how, tally=tally)
    assert torch.equal(made, generate(decoder, ids, how))
    assert tally.kept < tally.guessed


def test_a_draft_that_is_never_wrong_costs_one_round_in_length_and_one() -> None:
    decoder = small()[1]
    tally = Tally()
    ids = torch.tensor([[3, 5, 7]])
    draft = draft_without(decoder, ["b1.mlp"], 3)  # it adds nothing
    generate_speculatively(decoder, draft, ids, Generation(max_new_tokens=20), tally=tally)
    assert tally == Tally(rounds=5, guessed=15, kept=15)
    assert tally.acceptance == 1.0


def wrong_rest(how: Sampling, logits: Tensor, guess: Tensor | None, chance: list[Tensor],
               generator: torch.Generator | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A rule that looks right: what is not kept is drawn from p, not from what is left of it."""
    tokens, kept = RULE(how, logits, guess, chance, generator)
    if guess is None:
        return tokens, kept
    return torch.where(kept, guess, how.next(logits, generator)), kept


RULE = speculate.decided
P = torch.tensor([[2.0, 0.5, 0.0, -1.0]])
Q = torch.tensor([[0.0, 0.5, 1.0, 0.3]])


def chi_squared(seen: Tensor, chances: Tensor) -> float:
    wanted = chances.double() * seen.sum()
    return float(((seen.double() - wanted).square() / wanted).sum())


@pytest.mark.parametrize("how", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}])
def test_a_token_is_drawn_with_the_chances_of_the_whole_model(how: dict[str, Any]) -> None:
    """Chi-squared with at most 3 degrees of freedom: its 99.9% quantile is 16.3."""
    sampling, rows = Sampling(do_sample=True, **how), 20_000
    generator = torch.Generator().manual_seed(0)
    p, q = sampling.probabilities(P), sampling.probabilities(Q).expand(rows, -1)
    guess = torch.multinomial(q, 1, generator=generator)[:, 0]
    within = p[0] > 0
    for rule, right in ((RULE, True), (wrong_rest, False)):
        made, kept = rule(sampling, P.expand(rows, -1), guess, [q], generator)
        seen = made.bincount(minlength=4)
        assert not seen[~within].any()
        assert (chi_squared(seen[within], p[0, within]) < 16.3) is right
        share = float(torch.minimum(p[0], q[0]).sum())
        assert abs(float(kept.float().mean()) - share) < 0.02


@lru_cache(maxsize=1)
def sequences() -> tuple[Decoder, Draft, Tensor, Tensor]:
    """A model of few words, a poor draft of it, a prompt, and the chances of all sequences of three
    words after it."""
    program, decoder = small(WORDS, 1)
    prompt = torch.tensor([[0, 2, 1]])
    every = torch.tensor(list(itertools.product(range(WORDS), repeat=3)))
    with torch.no_grad():
        ids = torch.cat((prompt.expand(len(every), -1), every), 1)
        logits = program(input_ids=ids)["logits"].double()
        chances = (logits / WARM).softmax(-1)[:, 2:5]
    chances = chances.gather(2, every[..., None])[..., 0].prod(-1)
    assert float(chances.sum()) == pytest.approx(1.0)
    return decoder, draft_without(decoder, ["b0.mlp"], 3), prompt, chances


def draws(runs: int, batch: int, tally: Tally) -> Tensor:
    """How often each sequence of three words came out."""
    decoder, draft, prompt, _ = sequences()
    torch.manual_seed(7)
    how = Generation(max_new_tokens=3, do_sample=True, temperature=WARM)
    made = [
        generate_speculatively(decoder, draft, prompt.expand(batch, -1), how, tally=tally)[:, 3:]
        for _ in range(runs)
    ]
    at = torch.cat(made) @ torch.tensor([WORDS**2, WORDS, 1])
    return at.bincount(minlength=WORDS**3)


def test_sequences_are_drawn_with_the_chances_of_the_whole_model() -> None:
    """Chi-squared over 64 sequences: 63 degrees of freedom, whose 99.9% quantile is 103.4."""
    tally = Tally()
    assert float(sequences()[3].min()) * 3200 > 3  # so that the test is fit for every cell
    assert chi_squared(draws(400, 8, tally), sequences()[3]) < 103.4
    assert 0.02 < tally.acceptance < 0.9


def test_a_wrong_rule_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "decided", wrong_rest)
    assert chi_squared(draws(400, 8, Tally()), sequences()[3]) > 103.4


def test_draws_repeat_with_their_seed() -> None:
    decoder, draft, prompt, _ = sequences()
    how = Generation(max_new_tokens=12, do_sample=True, seed=3)
    first, second = (generate_speculatively(decoder, draft, prompt, how) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_gain_is_that_of_a_simulation(acceptance: float, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(40_000, length, generator=generator) < acceptance
    tokens = kept.long().cumprod(1).sum(1).double().mean() + 1
    expected = float(tokens) / (length * 0.4 + 1)
    assert predicted_gain(acceptance, 0.4, length) == pytest.approx(expected, rel=0.02)
    assert predicted_gain(1.0, 0.4, length) == pytest.approx((length + 1) / (length * 0.4 + 1))


def by_sublayers(decoder: Decoder, tokens: int) -> float:
    """A clock for which every sublayer takes a second, however many tokens there are."""
    return float(len(removable(decoder.program)))


def even(decoder: Decoder, tokens: int) -> float:
    """A clock for which nothing is saved by leaving sublayers out."""
    return 1.0


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(0, 40, (4, 32), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(do_sample=True)])
def test_what_is_chosen_gains_most(text: Tensor, sampling: Sampling) -> None:
    decoder = small()[1]
    found = choose(decoder, [text], sampling, by_sublayers)
    assert isinstance(found, Draft)
    assert found.skipped[0] == "b1.mlp"  # it adds nothing
    assert found.acceptance is not None and found.cost is not None and found.gain is not None
    assert found.cost == (4 - len(found.skipped)) / 4
    gains = [predicted_gain(found.acceptance, found.cost, length) for length in LENGTHS]
    assert found.gain == max(gains) and LENGTHS[gains.index(found.gain)] == found.length
    assert found.gain >= predicted_gain(1.0, 0.75, 8)  # that of the sublayer that adds nothing


def test_the_acceptance_is_measured_on_the_text(text: Tensor) -> None:
    program, decoder = small()
    found = choose(decoder, [Batch((), {"input_ids": text})], None, by_sublayers)
    assert isinstance(found, Draft)
    state = found.decoder.state(4, 32)
    with torch.no_grad():
        agree = program(input_ids=text)["logits"].argmax(-1) == found.decoder.prefill(
            state, text
        ).argmax(-1)
    assert found.acceptance == pytest.approx(float(agree.float().mean()))


def test_no_more_text_is_read_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.compiler.decode.draft.TOKENS", 70)
    ids = torch.arange(128).view(4, 32) % 40
    valid = torch.ones_like(ids, dtype=torch.bool)
    read = _batches(small()[1], [Batch((), {"input_ids": ids}, valid), ids])
    assert [tuple(batch.kwargs["input_ids"].shape) for batch in read] == [(2, 32)]
    assert read[0].valid is not None and read[0].valid.shape == (2, 32)
    assert len(_batches(small()[1], [ids[:1], ids[1:2], ids])) == 3


def test_a_draft_that_does_not_pay_is_not_offered(text: Tensor) -> None:
    found = choose(small()[1], [text], None, even)
    assert isinstance(found, Miss)
    assert "under 1.05x" in found.reason and "100% of its guesses are kept" in found.reason
    less = choose(small()[1], [text], None, even, least=0.1)  # as one asks who wants to measure it
    assert isinstance(less, Draft) and less.gain is not None and 0.1 <= less.gain < 1.05
    more = choose(small()[1], [text], None, by_sublayers, least=100.0)
    assert isinstance(more, Miss) and "under 100.0x" in more.reason


def test_steps_are_timed_unless_a_clock_is_given(text: Tensor, monkeypatch: Any) -> None:
    timed = list[float]()

    def watched(decoder: Decoder, tokens: int) -> float:
        timed.append(seconds(decoder, tokens))
        return timed[-1]

    monkeypatch.setattr("attnopt.compiler.decode.draft.seconds", watched)
    choose(small()[1], [text])
    assert len(timed) > 2 and min(timed) > 0


def test_a_model_of_few_positions_has_no_draft_to_time(text: Tensor) -> None:
    def short(decoder: Decoder, tokens: int) -> float:
        raise Problem("A704", "no positions for 33 tokens")

    found = choose(small()[1], [text], None, short)
    assert isinstance(found, Miss) and "no positions for 33 tokens" in found.reason


def test_windows_that_take_back_more_are_made_once() -> None:
    decoder = derive(zoo("Mistral"), check=False)
    wider = decoder.with_slack(3)
    assert wider is not decoder and wider is decoder.with_slack(3) and wider.slack == 3
    assert small()[1].with_slack(3) is small()[1]


@pytest.mark.parametrize(
    ("skipped", "length", "told"),
    [
        (["b7.mlp"], 2, "no sublayer `b7.mlp`"),
        (["b0.mlp"], 0, "a draft of 0 tokens"),
        (["b0.attention", "b1.attention"], 2, "no attention is left"),
    ],
)
def test_drafts_that_cannot_be(skipped: list[str], length: int, told: str) -> None:
    with pytest.raises(Problem, match=told) as caught:
        draft_without(small()[1], skipped, length)
    assert caught.value.code == "A709"


def test_a_draft_needs_text() -> None:
    with pytest.raises(Problem, match="chosen on text") as caught:
        choose(small()[1], [])
    assert caught.value.code == "A709"


class _Said:
    def files(self) -> dict[str, bytes]:
        return {"report.json": b"{}"}

    def evidence(self) -> dict[str, Any]:
        return {}


def test_a_saved_run_speculates(tmp_path: Path, text: Tensor, monkeypatch: Any) -> None:
    program, decoder = small()
    batches = [Batch((), {"input_ids": text})]
    save(tmp_path / "run", program, Plan(), _Said(), batches)
    monkeypatch.setattr("attnopt.compiler.decode.draft.seconds", by_sublayers)
    model = load(tmp_path / "run")
    ids = text[:1, :5]
    expected = generate(decoder, ids, Generation(max_new_tokens=15))
    assert torch.equal(model.generate(ids, speculate=True, max_new_tokens=15), expected)
    made = model.draft(remember=True)
    assert isinstance(made, Draft) and "b1.mlp" in made.skipped
    columns = list(model.stream(ids, speculate=made, max_new_tokens=15))
    assert torch.equal(torch.stack(columns, 1), expected[:, 5:])

    monkeypatch.setattr("attnopt.compiler.decode.draft.seconds", even)
    again = load(tmp_path / "run").draft()  # remembered, not measured
    assert isinstance(again, Draft) and (again.skipped, again.gain) == (made.skipped, made.gain)
    refused = model.draft([text], remember=True)
    assert isinstance(refused, Miss)
    with pytest.warns(RuntimeWarning, match="under 1.05x"):
        plain = load(tmp_path / "run").generate(ids, speculate=True, max_new_tokens=15)
    assert torch.equal(plain, expected)
