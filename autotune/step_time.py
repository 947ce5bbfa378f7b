"""How long a decoding step takes: decoders against each other, in turns, on the tokens of the
workload.

Each reads the same prompt once; a sample then reads the tokens that follow it one by one, as
generation does, and takes them back. Steps run as `Decoder.step` does uncompiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.autotune.timing import Contender, Progress, Timing, check_inputs, compare
from attnopt.compiler.decode import Decoder
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Batch
from attnopt.compiler.raising.evaluate import example_input

STEPS = 8  # tokens that a sample reads, at most


@dataclass(frozen=True)
class Load:
    """What is read: a prompt, and the tokens after it, each `[batch, S]` by input of tokens."""

    prompt: tuple[Tensor, ...]
    after: tuple[Tensor, ...]

    @property
    def whole(self) -> Batch:
        """The prompt and what follows it; a tail of padding alone is then no constant input."""
        pairs = zip(self.prompt, self.after, strict=True)
        return Batch(tuple(torch.cat(pair, 1) for pair in pairs))

    @property
    def words(self) -> str:
        """The size of it."""
        rows, cached = self.prompt[0].shape[:2]
        return f"{rows} × {cached} tokens cached"


def load_of(decoder: Decoder) -> Load:
    """The example of a decoder's program, cut into a prompt and what follows.

    Raises `Problem` A403 where it is shorter than two tokens, or all of one value.
    """
    program = decoder.program
    given = [example_input(program, program.node(name)) for name in decoder.split.tokens]
    length = int(given[0].shape[1])
    if length < 2:
        raise Problem(
            "A403", "a decoding step cannot be timed on sequences of one token",
            help="give longer ones, with --length or --inputs",
        )  # fmt: skip
    cut = length - min(STEPS, length // 2)
    load = Load(tuple(x[:, :cut] for x in given), tuple(x[:, cut:] for x in given))
    check_inputs(load.whole)
    return load


def race(
    decoders: Mapping[str, Decoder], load: Load, seconds: float, progress: Progress | None = None
) -> Timing:
    """Time steps of decoders of one model in pairs; samples hold as many steps as the load has
    tokens after its prompt."""
    contenders = [Contender(name, _Steps(decoder, load)) for name, decoder in decoders.items()]
    return compare(contenders, [load.whole], seconds=seconds, precision=0.02, progress=progress)


class _Steps:
    """A decoder that has read a prompt: called with that and what follows, it reads what follows
    and takes it back."""

    def __init__(self, decoder: Decoder, load: Load) -> None:
        rows, self.read = (int(size) for size in load.prompt[0].shape[:2])
        new = int(load.after[0].shape[1])
        self.decoder = decoder.with_slack(new)
        self.state = self.decoder.state(rows, self.read + new)
        self.decoder.prefill(self.state, *load.prompt, last=True)

    def __call__(self, *tokens: Tensor) -> Tensor:
        logits = torch.empty(0)
        for at in range(self.read, tokens[0].shape[1]):
            logits = self.decoder.step(self.state, *(x[:, at : at + 1] for x in tokens), last=True)
        self.decoder.rewind(self.state, self.read)
        return logits
