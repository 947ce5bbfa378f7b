"""Generating text with a decoder: prompt in, prompt and new tokens out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.decode.decoder import Decoder
from attnopt.compiler.decode.sampling import Sampling
from attnopt.compiler.decode.split import vocabulary
from attnopt.compiler.decode.state import State
from attnopt.compiler.errors import Problem


@dataclass(frozen=True)
class Generation(Sampling):
    """How much to generate, and how: `max_new_tokens` at most.

    A row ends after one of `eos_token_id` and is filled with `pad_token_id` (the first of
    `eos_token_id` unless given); all stop once every row has ended. `prefill_chunk` reads the
    prompt in parts of so many tokens, which bounds the memory that a long one takes.
    """

    max_new_tokens: int = 20
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "prefill_chunk"):
            given = getattr(self, name)
            if given is not None and (not isinstance(given, int) or given < 1):
                raise Problem("A707", f"{name} must be a whole number from 1 on, got {given!r}")

    @property
    def ends(self) -> list[int]:
        """The tokens that end a row."""
        if self.eos_token_id is None:
            return []
        found: list[int] = torch.as_tensor(self.eos_token_id).reshape(-1).tolist()
        return found


def read(how: Mapping[str, Any]) -> Generation:
    """Arguments by name. Raises `Problem` A707 on unknown ones."""
    known = [item.name for item in fields(Generation)]
    for name in how:
        if name not in known:
            raise Problem("A707", f"generate has no argument `{name}`",
                          help=f"it takes {', '.join(known)}")  # fmt: skip
    return Generation(**{name: value for name, value in how.items() if value is not None})


class Rows:
    """Which rows of a batch go on; those that have ended are filled."""

    def __init__(self, how: Generation, batch: int) -> None:
        self.going = [True] * batch
        self._ends = frozenset(how.ends)
        self._fill = how.ends[0] if how.pad_token_id is None and how.ends else how.pad_token_id or 0

    def take(self, tokens: Tensor) -> Tensor:
        """New tokens, one per row, with the fill where a row has ended before."""
        if not self._ends:
            return tokens
        rows = list(zip(self.going, tokens.flatten().tolist(), strict=True))
        filled = tokens
        if not all(self.going):
            filled = tokens.new_tensor([x if going else self._fill for going, x in rows])
        self.going = [going and x not in self._ends for going, x in rows]
        return filled.view_as(tokens)

    @property
    def done(self) -> bool:
        """Whether all rows have ended."""
        return not any(self.going)


def generate(
    decoder: Decoder, input_ids: Tensor, how: Generation, attention_mask: Tensor | None = None
) -> Tensor:
    """The prompt with new tokens after it, int64 `[batch, prompt + new]`.

    `input_ids` is int64 `[batch, prompt]`; prompts of other lengths are padded on the left, and
    `attention_mask` of that shape is 0 there. Raises `Problem` A707 on inputs that do not fit.
    """
    return torch.cat((input_ids, *_columns(decoder, input_ids, how, attention_mask)), 1)


def stream(
    decoder: Decoder, input_ids: Tensor, how: Generation, attention_mask: Tensor | None = None
) -> Iterator[Tensor]:
    """As `generate`: gives each new column, int64 `[batch]`, as soon as it is there."""
    for column in _columns(decoder, input_ids, how, attention_mask):
        yield column[:, 0]


def _columns(
    decoder: Decoder, input_ids: Tensor, how: Generation, attention_mask: Tensor | None
) -> Iterator[Tensor]:
    """New columns `[batch, 1]`. What runs between steps is as little as may be: the processor's
    caches hold weights by then, and Python takes several times as long as it does elsewhere."""
    mask = checked(decoder, input_ids, attention_mask)
    decoder = decoder.taking(mask)
    batch, prompt = input_ids.shape
    capacity = prompt + how.max_new_tokens - 1  # the last token is not read
    state = decoder.state(batch, capacity, decoder.masks(mask))
    positions = mask.long().cumsum(1).sub(1).clamp(min=0)
    generator = how.generator(input_ids.device)
    logits = _read(decoder, state, input_ids, positions, how.prefill_chunk or prompt)
    rows = Rows(how, batch)
    at = positions[:, -1:]
    counts = any("position" in name for name in decoder.split.tokens)
    tokens = how.next(logits[:, -1], generator)[:, None]
    for left in range(how.max_new_tokens - 1, -1, -1):
        tokens = rows.take(tokens)
        yield tokens
        if not left or rows.done:
            return
        at = at + 1 if counts else at
        given = inputs_of(decoder, tokens, at)
        if how.do_sample:
            logits = decoder.step(state, *given, last=True)
            tokens = how.next(logits[:, -1], generator)[:, None]
        else:
            tokens = decoder.next(state, *given)


def _read(decoder: Decoder, state: State, ids: Tensor, positions: Tensor, chunk: int) -> Tensor:
    for start in range(0, ids.shape[1], chunk):
        part = slice(start, start + chunk)
        given = inputs_of(decoder, ids[:, part], positions[:, part])
        logits = decoder.step(state, *given, last=True)
    return logits


def inputs_of(decoder: Decoder, tokens: Tensor, positions: Tensor) -> list[Tensor]:
    """The inputs that come token by token, in order."""
    return [positions if "position" in name else tokens for name in decoder.split.tokens]


def checked(decoder: Decoder, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The mask of the prompt, whole where none is given."""
    for name, given in (("input_ids", ids), ("attention_mask", mask)):
        if given is not None and not isinstance(given, Tensor):
            raise Problem("A707", f"{name} is a tensor, not {type(given).__name__}")
    if ids.dim() != 2 or not ids.shape[1] or ids.dtype not in (torch.int64, torch.int32):
        raise Problem("A707", f"input_ids are whole numbers [batch, prompt], got {ids.dtype} "
                      f"{list(ids.shape)}")  # fmt: skip
    others = [n for n in decoder.split.tokens if "position" not in n]
    if len(others) != 1:
        raise Problem(
            "A707", f"the model reads more than tokens: {', '.join(others)}",
            help="call prefill and step of the decoder with all of them",
        )  # fmt: skip
    known = vocabulary(decoder.program.node(others[0]))
    if known is not None and not (int(ids.min()) >= 0 and int(ids.max()) < known):
        raise Problem(
            "A707", f"input_ids hold {int(ids.min())} to {int(ids.max())}",
            why=f"the model knows the tokens 0 to {known - 1}",
            help="were they made by the tokenizer of another model?",
        )  # fmt: skip
    if mask is None:
        return torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise Problem("A707", f"attention_mask {list(mask.shape)} and input_ids "
                      f"{list(ids.shape)} differ in shape")  # fmt: skip
    if not bool((mask[:, -1] != 0).all()):
        raise Problem("A707", "the last position of a prompt is padding",
                      help="pad prompts on the left")  # fmt: skip
    return mask
