"""Speculative decoding of the project's language model by itself without some sublayers, with the
draft that is predicted to gain most on calibration text, whether or not that is enough for it to be
taken: what is predicted, and how much faster generation is. The tokens have to be those of plain
decoding.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from torch import Tensor

from attnopt.autotune.timing import Contender, compare
from attnopt.compiler.contract import Miss
from attnopt.compiler.decode import Decoder, draft
from attnopt.compiler.decode.generate import Generation, generate
from attnopt.compiler.decode.speculate import Tally, generate_speculatively
from attnopt.compiler.program import Batch
from benchmarks.decode import PYLM, decoder_of, pylm
from benchmarks.run import Row

PROMPT, NEW, PROMPTS = 128, 128, 4
CASE = "pylm, batch 1, the best draft"


def rows() -> list[Row]:
    """One row, with steps that are not compiled."""
    decoder = decoder_of(pylm())
    texts, prompts = _ids("calibration.txt", 512, 1), _ids("eval.txt", PROMPT, PROMPTS)
    best = draft.choose(decoder, texts, least=0.0)
    if isinstance(best, Miss):
        return [Row(CASE, best.reason)]
    made = _measured(decoder, best, prompts)
    print(f"{made.case}: {made.figure}", file=sys.stderr, flush=True)
    return [made]


def _ids(name: str, length: int, count: int) -> list[Tensor]:
    """Token ids `[1, length]` from the start of a text, so many."""
    from transformers import AutoTokenizer

    text = (PYLM / name).read_text(encoding="utf-8")[: 12 * length * count]
    ids = torch.tensor(AutoTokenizer.from_pretrained(PYLM)(text)["input_ids"])
    return list(ids[: length * count].reshape(count, 1, length))


def _told(made: draft.Draft) -> str:
    return (
        f"{made.length} guesses without {', '.join(made.skipped)}: {made.acceptance:.0%} kept, "
        f"a step {made.cost:.2f} of a whole one, predicted {made.gain:.2f}x, "
        f"{'taken' if (made.gain or 0.0) >= draft.LEAST_GAIN else 'not taken'} by itself"
    )


def _measured(decoder: Decoder, best: draft.Draft, prompts: list[Tensor]) -> Row:
    how, tally = Generation(max_new_tokens=NEW), Tally()

    def plain(ids: Tensor) -> Tensor:
        return generate(decoder, ids, how)

    def guessed(ids: Tensor) -> Tensor:
        return generate_speculatively(decoder, best, ids, how, tally=tally)

    if not all(torch.equal(plain(ids), guessed(ids)) for ids in prompts):
        return Row(CASE, "other tokens than plain decoding", met=False)
    counted = replace(tally)
    batches = [Batch((ids,)) for ids in prompts]
    forms = [Contender("plain", plain), Contender("speculating", guessed)]
    timing = compare(forms, batches, seconds=30.0, rounds=5)
    over = timing.ratio("speculating", "plain")
    figure = (
        f"{over.value:.2f}x plain decoding ({over.interval.low:.2f} to {over.interval.high:.2f}), "
        f"{counted.acceptance:.0%} of the guesses kept; {_told(best)}"
    )
    numbers = {"over": over.as_json(), "tally": vars(counted), **best.as_json()}
    return Row(CASE, figure, numbers=numbers)
