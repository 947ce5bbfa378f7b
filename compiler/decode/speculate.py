"""Speculative decoding: a draft guesses a few tokens, the whole model reads them at once and keeps
those that it would have chosen itself.

Without sampling the longest run of guesses that are the most likely tokens is kept, so the output
is that of plain decoding. With sampling, a guess x drawn with q(x) is kept with the probability
min(1, p(x) / q(x)), else a token is drawn with max(0, p - q), normalised: what comes out is drawn
with p (Leviathan et al. 2023, arXiv:2211.17192, appendix A.1; Chen et al. 2023, arXiv:2302.01318).
After the last guess that is kept, the whole model's own next token follows, and the caches go back
to what was kept.

The rows of a batch advance together. At each position every row's token is decided by the rule
above, and the round ends after the first position where a row's guess was not kept. Whether a
position is reached so depends on earlier positions alone, and each token is still drawn with p.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.compiler.decode.decoder import Decoder
from attnopt.compiler.decode.draft import Draft
from attnopt.compiler.decode.generate import Generation, Rows, checked, inputs_of
from attnopt.compiler.decode.sampling import Sampling, most_likely
from attnopt.compiler.errors import Problem


@dataclass
class Tally:
    """What a generation did: rounds, guesses that were made, and those that were kept."""

    rounds: int = 0
    guessed: int = 0
    kept: int = 0

    @property
    def acceptance(self) -> float:
        """The share of the guesses that were kept (0 to 1); later guesses of a round count even
        where an earlier one was not kept."""
        return self.kept / self.guessed if self.guessed else 0.0


def generate_speculatively(
    decoder: Decoder,
    draft: Draft,
    input_ids: Tensor,
    how: Generation,
    attention_mask: Tensor | None = None,
    tally: Tally | None = None,
) -> Tensor:
    """The prompt with new tokens after it, int64 `[batch, prompt + new]`: those of `generate`
    without sampling, with it draws of the same distribution. Raises `Problem` as `generate` does.
    """
    columns = stream_speculatively(decoder, draft, input_ids, how, attention_mask, tally)
    return torch.cat((input_ids, *(tokens[:, None] for tokens in columns)), 1)


def stream_speculatively(
    decoder: Decoder,
    draft: Draft,
    input_ids: Tensor,
    how: Generation,
    attention_mask: Tensor | None = None,
    tally: Tally | None = None,
) -> Iterator[Tensor]:
    """As `generate_speculatively`: gives each new column, int64 `[batch]`, as soon as it is sure.

    `tally`, where given, is filled as it goes.
    """
    mask = checked(decoder, input_ids, attention_mask)
    decoder = decoder.taking(mask)
    batch, known = input_ids.shape
    end = known + how.max_new_tokens
    tokens = torch.zeros(batch, end, dtype=torch.int64, device=input_ids.device)
    tokens[:, :known] = input_ids
    whole = _Reader(decoder, mask, tokens, draft.length, decoder.masks(mask))
    guessing = _taking(draft.decoder, mask)
    seen = guessing.masks(mask) if guessing.split.masks else {}
    small = _Reader(guessing, mask, tokens, draft.length, seen)
    chunk = how.prefill_chunk or known
    for reader in (whole, small):
        reader.prompt(known - 1, chunk)
    rows = Rows(how, batch)
    generator = how.generator(input_ids.device)
    tally = tally if tally is not None else Tally()
    while known < end:
        count = min(draft.length, end - known - 1)
        chances = [small.guess(known + i, how, generator) for i in range(count)]
        logits = whole.read(known + count)
        tally.rounds, tally.guessed = tally.rounds + 1, tally.guessed + count
        for i in range(count + 1):
            guess = tokens[:, known].clone() if i < count else None
            made, kept = decided(how, logits[:, i], guess, chances[i : i + 1], generator)
            going = rows.going
            tokens[:, known] = made = rows.take(made)
            known += 1
            yield made
            if rows.done:
                return
            if not all(was or not goes for was, goes in zip(kept.tolist(), going, strict=True)):
                break
            tally.kept += i < count
        for reader in (whole, small):
            reader.back(known - 1)


def _taking(decoder: Decoder, mask: Tensor) -> Decoder:
    """A draft's decoder that takes padding; as it is where there is none, since it only guesses."""
    try:
        return decoder.taking(mask)
    except Problem:
        return decoder


def decided(
    how: Sampling,
    logits: Tensor,
    guess: Tensor | None,
    chance: list[Tensor],
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """The tokens of one position, int64 `[batch]`, and which of them are the guesses, bool.

    `logits` `[batch, vocabulary]` are the whole model's, `guess` `[batch]` the draft's tokens and
    `chance` holds what they were drawn with, `[batch, vocabulary]`, where there is sampling.
    Without a guess the token is the whole model's own.
    """
    if guess is None:
        tokens = how.next(logits, generator)
        return tokens, torch.zeros_like(tokens, dtype=torch.bool)
    if not how.do_sample:
        tokens = most_likely(logits)
        return tokens, tokens == guess
    p, q = how.probabilities(logits), chance[0]
    at = guess[:, None]
    drawn = torch.rand(at.shape, generator=generator, device=p.device)
    kept = (drawn * q.gather(1, at) < p.gather(1, at))[:, 0]
    if bool(kept.all()):
        return guess, kept
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # p is q but for rounding
    return torch.where(kept, guess, torch.multinomial(rest, 1, generator=generator)[:, 0]), kept


class _Reader:
    """A decoder and how far it has read `tokens` `[batch, end]`, whose later columns may change."""

    def __init__(
        self, decoder: Decoder, mask: Tensor, tokens: Tensor, back: int, masks: dict[str, Tensor]
    ) -> None:
        self.decoder, self.tokens = decoder.with_slack(back), tokens
        batch, end = tokens.shape
        more = mask.new_ones(batch, end - mask.shape[1])
        self.positions = torch.cat((mask, more), 1).long().cumsum(1).sub(1).clamp(min=0)
        self.state = self.decoder.state(batch, max(1, end - 1), masks)

    def prompt(self, end: int, chunk: int) -> None:
        """Read the columns before `end`, so many at a time."""
        while self.state.length < end:
            self._step(min(end, self.state.length + chunk), last=True)

    def read(self, end: int) -> Tensor:
        """Read the columns before `end` that are not read yet; their logits
        `[batch, columns, vocabulary]`."""
        return self._step(end, last=False)

    def guess(self, at: int, how: Sampling, generator: torch.Generator | None) -> Tensor:
        """Choose the tokens of column `at` and write them there; what they were drawn with
        `[batch, vocabulary]`, or the tokens without sampling."""
        if not how.do_sample:
            likely = self.decoder.next(self.state, *self._given(at))
            self.tokens[:, at] = likely[:, 0]
            return likely
        chance = how.probabilities(self._step(at, last=True)[:, -1])
        self.tokens[:, at] = torch.multinomial(chance, 1, generator=generator)[:, 0]
        return chance

    def back(self, end: int) -> None:
        """Forget the columns from `end` on."""
        self.decoder.rewind(self.state, min(end, self.state.length))

    def _step(self, end: int, last: bool) -> Tensor:
        return self.decoder.step(self.state, *self._given(end), last=last)

    def _given(self, end: int) -> list[Tensor]:
        part = slice(self.state.length, end)
        return inputs_of(self.decoder, self.tokens[:, part], self.positions[:, part])
