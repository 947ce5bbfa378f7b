"""Speculative decoding of the project's language model by itself without some sublayers: what is
chosen on calibration text and predicted, and, with the best draft there is whether or not it was
chosen, how much faster generation is. The tokens have to be those of plain decoding.
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


def rows() -> list[Row]:
    """One row of the choice, one of the best draft, both with steps that are not compiled."""
    decoder = decoder_of(pylm())
    texts, prompts = _ids("calibration.txt", 512, 1), _ids("eval.txt", PROMPT, PROMPTS)
    chosen = draft.choose(decoder, texts)
    said = chosen.reason if isinstance(chosen, Miss) else _told(chosen)
    case = "pylm, batch 1"
    made = [Row(f"{case}, what is chosen", said, f"on from {draft.LEAST_GAIN}x predicted")]
    print(f"{made[-1].case}: {said}", file=sys.stderr, flush=True)
    best = draft.choose(decoder, texts, least=0.0) if isinstance(chosen, Miss) else chosen
    if not isinstance(best, Miss):
        made.append(_measured(case, decoder, best, prompts))
        print(f"{made[-1].case}: {made[-1].figure}", file=sys.stderr, flush=True)
    return made


def _ids(name: str, length: int, count: int) -> list[Tensor]:
    """Token ids `[1, length]` from the start of a text, so many."""
    from transformers import AutoTokenizer

    text = (PYLM / name).read_text(encoding="utf-8")[: 12 * length * count]
    ids = torch.tensor(AutoTokenizer.from_pretrained(PYLM)(text)["input_ids"])
    return list(ids[: length * count].reshape(count, 1, length))


def _told(made: draft.Draft) -> str:
    return (
        f"{made.length} guesses without {', '.join(made.skipped)}: {made.acceptance:.0%} kept, "
        f"a step {made.cost:.2f} of a whole one, predicted {made.gain:.2f}x"
    )


def _measured(case: str, decoder: Decoder, best: draft.Draft, prompts: list[Tensor]) -> Row:
    how, tally = Generation(max_new_tokens=NEW), Tally()

    def plain(ids: Tensor) -> Tensor:
        return generate(decoder, ids, how)

    def guessed(ids: Tensor) -> Tensor:
        return generate_speculatively(decoder, best, ids, how, tally=tally)

    case = f"{case}, the best draft"
    if not all(torch.equal(plain(ids), guessed(ids)) for ids in prompts):
        return Row(case, "other tokens than plain decoding", met=False)
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
    return Row(case, figure, numbers=numbers)
