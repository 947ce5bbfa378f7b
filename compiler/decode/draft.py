"""A draft for speculative decoding: the model itself without some of its sublayers.

Which ones, and how many tokens it guesses, is chosen by measurement (SWIFT, arXiv:2410.06916,
section 3.2, measures as well). Sublayers are taken out greedily, the one first whose absence keeps
most of the acceptance: the chance a that the whole model keeps a guess, on calibration text. It is
the mean over tokens of sum_x min(p(x), q(x)) with sampling (arXiv:2211.17192, corollary 3.6), and
how often the most likely tokens agree without. With c the time of a draft's step and v that of
reading k + 1 tokens at once, both over that of a step of the whole model, k guesses gain

    (1 - a^(k+1)) / ((1 - a) (k c + v))

(ibid., theorem 3.8, where v is 1: on a device that waits for memory alone).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.compiler.contract import Miss, Notes
from attnopt.compiler.decode.decoder import Decoder
from attnopt.compiler.decode.generate import inputs_of
from attnopt.compiler.decode.sampling import Sampling, most_likely
from attnopt.compiler.decode.split import split
from attnopt.compiler.device import finish
from attnopt.compiler.errors import Problem
from attnopt.compiler.layout import is_symbol
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.raising.blocks import sublayers
from attnopt.compiler.raising.evaluate import example_input
from attnopt.compiler.removal import bypass_of, exit_of, without
from attnopt.compiler.site import Sublayer
from attnopt.compiler.skip_order import greedy

LEAST_GAIN = 1.05  # what gains less is not worth its second cache
LEAST_ACCEPTANCE = 0.5  # where no more sublayers are taken out: half the guesses are for nothing
LENGTHS = (1, 2, 3, 4, 6, 8)  # guesses that are tried
TOKENS = 512  # of calibration text, about: every candidate reads it at every removal
REPEATS, CONTEXT = 9, 32  # timed steps, and the tokens that stand before them

Clock = Callable[[Decoder, int], float]


@dataclass(frozen=True)
class Draft:
    """A decoder that guesses `length` tokens at a time: the whole one without `skipped`.

    `acceptance` is the chance that a guess is kept, measured on calibration text, `cost` the time
    of one of its steps over that of the whole model, and `gain` how many times as fast decoding is
    predicted to be; all None where the draft was given and not chosen.
    """

    decoder: Decoder
    skipped: tuple[str, ...]
    length: int
    acceptance: float | None = None
    cost: float | None = None
    gain: float | None = None

    def as_json(self) -> dict[str, Any]:
        """All but the decoder."""
        return {
            "skipped": list(self.skipped), "length": self.length, "acceptance": self.acceptance,
            "cost": self.cost, "gain": self.gain,
        }  # fmt: skip


def predicted_gain(acceptance: float, cost: float, length: int, verify: float = 1.0) -> float:
    """How many times as fast decoding is with `length` guesses a round; see the module's text."""
    a = acceptance
    tokens = float(length + 1) if a >= 1 else (1 - a ** (length + 1)) / (1 - a)
    return tokens / (length * cost + verify)


def draft_without(decoder: Decoder, skipped: Sequence[str], length: int) -> Draft:
    """A decoder's draft that leaves out the named sublayers ("b3.mlp").

    Raises `Problem` A709 on names that there are not, and where no attention is left.
    """
    known = {layer.id: layer for layer in removable(decoder.program)}
    unknown = [name for name in skipped if name not in known]
    if unknown or length < 1:
        what = f"no sublayer `{unknown[0]}`" if unknown else f"a draft of {length} tokens"
        raise Problem("A709", f"{what} in {decoder.program.name}" if unknown else what,
                      help=f"there are {', '.join(known)}" if unknown else "")  # fmt: skip
    made = without(decoder.program, [known[name] for name in skipped])
    if not made.attentions():
        raise Problem("A709", f"without {', '.join(skipped)} no attention is left")
    return Draft(_decoder(made, decoder), tuple(skipped), length)


def told(made: Draft | Miss) -> dict[str, Any]:
    """What was chosen, as JSON data; `restored` reads it back."""
    return made.as_json() if isinstance(made, Draft) else {"why_not": made.reason}


def restored(decoder: Decoder, told: Mapping[str, Any]) -> Draft | Miss:
    """What `told` gave. Raises `Problem` A709 where the model has no such sublayers."""
    if "why_not" in told:
        return Miss(str(told["why_not"]))
    made = draft_without(decoder, told["skipped"], int(told["length"]))
    return Draft(made.decoder, made.skipped, made.length, told.get("acceptance"),
                 told.get("cost"), told.get("gain"))  # fmt: skip


def removable(program: Program) -> list[Sublayer]:
    """The residual sublayers that can be left out."""
    found = []
    for layer in sublayers(program):
        try:
            exit_of(program, layer), bypass_of(program, layer)
        except KeyError:
            continue
        found.append(layer)
    return found


def choose(
    decoder: Decoder,
    texts: Sequence[Batch | Tensor],
    how: Sampling | None = None,
    clock: Clock | None = None,
    least: float = LEAST_GAIN,
) -> Draft | Miss:
    """The draft and the number of guesses with the highest predicted gain, or why there is none.

    `texts` are calibration batches of the model's inputs, or tokens int64 `[batch, seq]`; `how` is
    what the acceptance is measured for, `clock(decoder, n)` gives the seconds of a step of n tokens
    and is measured unless given; a predicted gain below `least` is none. Raises `Problem` A709
    without text.
    """
    how, clock = how or Sampling(), clock or seconds
    batches = _batches(decoder, texts)
    try:
        whole = clock(decoder, 1)
        verify = {length: clock(decoder, length + 1) / whole for length in LENGTHS}
    except Problem as problem:
        return Miss(f"its steps cannot be timed: {problem.what}")
    best: Draft | None = None
    for skipped, program, acceptance in _orders(decoder, batches, how):
        try:
            small = _decoder(program, decoder)
        except Problem:
            break  # no attention is left
        cost = clock(small, 1) / clock(decoder, 1)  # timed next to each other
        for length in LENGTHS:
            gain = predicted_gain(acceptance, cost, length, verify[length])
            if best is None or gain > (best.gain or 0.0):
                best = Draft(small, skipped, length, acceptance, cost, gain)
    if best is None:
        return Miss(
            "no sublayer of the model can be left out so that an attention stays and "
            f"{LEAST_ACCEPTANCE:.0%} of the guesses are kept"
        )
    if (best.gain or 0.0) < least:
        return Miss(
            f"the best draft, without {', '.join(best.skipped)}, is predicted to gain "
            f"{best.gain:.2f}x, under {least}x: {best.acceptance:.0%} of its guesses are kept "
            f"and its step takes {best.cost:.2f} of a whole one"
        )
    return best


def seconds(decoder: Decoder, tokens: int) -> float:
    """The measured time of a step of so many tokens, of one sequence (or the batch of a model that
    was traced for one), after a short prompt: the shortest of several, which what else runs
    disturbs least."""
    batch = 1 if is_symbol(decoder.split.batch) else int(decoder.split.batch)
    ids = torch.zeros(batch, CONTEXT + tokens, dtype=torch.int64, device=decoder.device)
    at = torch.arange(CONTEXT + tokens, device=decoder.device).expand(batch, -1)
    state = decoder.state(batch, CONTEXT + tokens)
    decoder.prefill(state, *inputs_of(decoder, ids[:, :CONTEXT], at[:, :CONTEXT]), last=True)
    given = inputs_of(decoder, ids[:, CONTEXT:], at[:, CONTEXT:])
    taken = []
    for _ in range(REPEATS + 1):
        state.length = CONTEXT  # what it holds does not matter here
        finish(decoder.device)
        start = time.perf_counter()
        decoder.step(state, *given, last=tokens == 1)
        finish(decoder.device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _decoder(program: Program, whole: Decoder) -> Decoder:
    return Decoder(program, split(program), whole.slack, whole.dtype, whole.counted)


def _orders(
    decoder: Decoder, batches: Sequence[Batch], how: Sampling
) -> Iterator[tuple[tuple[str, ...], Program, float]]:
    """Ever more sublayers left out, the program without them, and the acceptance."""
    program = decoder.program.copy()
    program.sublayers = tuple(removable(program))
    names = [layer.id for layer in program.sublayers]
    taken: list[str] = []
    notes = Notes(program, batches)
    most = 1 - LEAST_ACCEPTANCE
    likely: dict[int, Tensor] = {}  # the whole model's, by batch

    def refused(expected: Any, actual: Any, batch: Batch) -> tuple[float, float]:
        if id(batch) not in likely:
            likely[id(batch)] = _likely(how, _logits(expected, batch))
        kept = kept_by(likely[id(batch)], _likely(how, _logits(actual, batch)))
        return float((1 - kept).sum(dtype=torch.float64)), float(kept.numel())

    for choice in greedy(program, notes, names, len(names) - 1, most, refused):
        taken.append(choice.id)
        yield tuple(taken), choice.program, 1 - choice.damage


def kept_by(whole: Tensor, draft: Tensor) -> Tensor:
    """The chance that each guess is kept, `[rows]`, from the most likely tokens `[rows]` or the
    probabilities `[rows, vocabulary]` of both."""
    return torch.minimum(whole, draft).sum(-1) if whole.dim() > 1 else (whole == draft).float()


def _likely(how: Sampling, logits: Tensor) -> Tensor:
    return how.probabilities(logits) if how.do_sample else most_likely(logits)


def _logits(out: Any, batch: Batch) -> Tensor:
    """The logits at real tokens, `[tokens, vocabulary]`, among a model's outputs."""
    found = next(x for x in pytree.tree_leaves(out) if isinstance(x, Tensor) and x.dim() == 3)
    return found[batch.valid] if batch.valid is not None else found.flatten(0, 1)


def _batches(decoder: Decoder, texts: Sequence[Batch | Tensor]) -> list[Batch]:
    found, left = list[Batch](), TOKENS
    for text in texts:
        made = (text if isinstance(text, Batch) else _batch(decoder, text)).to(decoder.device)
        shapes = [x.shape for x in pytree.tree_leaves((made.args, dict(made.kwargs)))
                  if isinstance(x, Tensor) and x.dim() > 1]  # fmt: skip
        rows, length = max((tuple(shape[:2]) for shape in shapes), key=lambda s: s[0] * s[1])
        fit = max(1, left // length)
        whole = fit >= rows or not is_symbol(decoder.split.batch)
        found.append(made if whole else _cut(made, rows, fit))
        left -= rows * length
        if left <= 0:
            break
    if not found:
        raise Problem("A709", "a draft is chosen on text, and there is none",
                      help="give batches of tokens like the ones to be continued")  # fmt: skip
    return found


def _cut(batch: Batch, rows: int, fit: int) -> Batch:
    """The first rows of a batch, as many as fit."""
    args, kwargs, valid = pytree.tree_map_only(
        Tensor,
        lambda x: x[:fit] if x.dim() > 1 and len(x) == rows else x,
        (batch.args, dict(batch.kwargs), batch.valid),
    )
    return Batch(args, kwargs, valid)


def _batch(decoder: Decoder, ids: Tensor) -> Batch:
    """A call of the whole model on tokens `[batch, seq]`, all of them real."""
    program, parts = decoder.program, decoder.split
    values: dict[str, Any] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        value = example_input(program, node)
        if node.name in parts.masks:
            value = torch.full_like(ids, parts.real, dtype=value.dtype)
        elif node.name in parts.tokens:
            at = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
            value = at if "position" in node.name else ids
        values[node.name] = value
    if set(values) == set(program.example.kwargs):
        return Batch((), values)
    _, form = pytree.tree_flatten((program.example.args, dict(program.example.kwargs)))
    args, kwargs = pytree.tree_unflatten(list(values.values()), form)
    return Batch(args, kwargs)
