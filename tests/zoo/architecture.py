"""`Architecture`: one entry of the coverage table, and wrappers that give models plain inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import VOCABULARY, Inputs, Wrapped, ids, masked

SHAPES = ((2, 12), (3, 17), (4, 9))
BOTH = ("sdpa", "eager")


@dataclass(frozen=True)
class Architecture:
    """How to build a model in each of its spellings, and how many attentions it has.

    `inputs(batch, length)` makes inputs; `shapes` are tried, the first one is traced. `double`
    is False for models that do not run in float64.
    """

    name: str
    library: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[int, int], Inputs]
    sites: int
    spellings: tuple[str, ...] = BOTH
    shapes: tuple[tuple[int, int], ...] = SHAPES
    double: bool = True


class Bare(Wrapped):
    """An encoder without a mask."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._tensor(input_ids=input_ids)


class Masked(Wrapped):
    """A decoder with a padding mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._tensor(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


class Packed(Wrapped):
    """A decoder that reads several documents in one row, told by their positions."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self._tensor(input_ids=input_ids, position_ids=position_ids, use_cache=False)


class Seq2Seq(Wrapped):
    """An encoder and a decoder."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> Tensor:
        return self._tensor(
            input_ids=input_ids, attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids, use_cache=False,
        )  # fmt: skip


class Speech(Wrapped):
    """Spectrograms to text."""

    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self._tensor(
            input_features=input_features, decoder_input_ids=decoder_input_ids, use_cache=False
        )


class Wave(Wrapped):
    """Raw audio."""

    def forward(self, input_values: Tensor) -> Tensor:
        return self._tensor(input_values=input_values)


def transformers(
    head: str, config: str, wrapper: type[Wrapped], **settings: Any
) -> Callable[[str], nn.Module]:
    """A builder of a `transformers` model from its configuration."""

    def build(spelling: str) -> nn.Module:
        import transformers as library

        made = getattr(library, config)(**settings)
        made._attn_implementation = spelling
        torch.manual_seed(0)
        model = getattr(library, head)(made)
        for parameter in model.parameters():  # tables of biases, say, of which zeros tell nothing
            if parameter.dim() > 1 and not parameter.any():
                torch.nn.init.normal_(parameter)
        return wrapper(model).eval()

    return build


def packed(batch: int, length: int) -> Inputs:
    """Random tokens; the positions begin anew after a third, and in the second row also after
    half."""
    position = torch.arange(length).repeat(batch, 1)
    position[:, length // 3 :] -= length // 3
    position[1:, length // 2 :] -= int(position[1, length // 2]) if batch > 1 else 0
    return {**ids(batch, length), "position_ids": position}


def seq2seq(batch: int, length: int) -> Inputs:
    """Padded tokens for the encoder, others for the decoder."""
    decoder = torch.randint(3, VOCABULARY, (batch, length + 3))
    return {**masked(batch, length), "decoder_input_ids": decoder}


def image(side: int) -> Callable[[int, int], Inputs]:
    """Random images of a fixed size."""

    def make(batch: int, length: int) -> Inputs:
        return {"pixel_values": torch.randn(batch, 3, side, side)}

    return make


__all__ = [
    "BOTH", "SHAPES", "Architecture", "Bare", "Inputs", "Masked", "Packed", "Seq2Seq", "Speech",
    "Wave",
    "ids", "image", "masked", "packed", "seq2seq", "transformers",
]  # fmt: skip
