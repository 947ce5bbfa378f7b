"""Choosing the next token from logits, with the names and the order of `transformers`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnopt.compiler.errors import Problem

_FEW = 8192  # logits of which torch finds the largest as fast


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; without `do_sample` it is the most likely one.

    `temperature` divides the logits, `top_k` keeps the k most likely tokens (0 keeps all), `top_p`
    the fewest whose probabilities sum to at least p (Holtzman et al. 2020, arXiv:1904.09751,
    section 3.1), in this order. `seed` makes the draws repeatable.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise Problem("A707", f"the temperature must be positive, got {self.temperature}",
                          help="do_sample=False takes the most likely token")  # fmt: skip
        if not 0 < self.top_p <= 1:
            raise Problem("A707", f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise Problem("A707", f"top_k must be 0 (all tokens) or more, got {self.top_k}")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The source of the draws; None for torch's own."""
        if self.seed is None or not self.do_sample:
            return None
        return torch.Generator(device).manual_seed(self.seed)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn with, `[batch, vocabulary]`, from logits of that shape."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            lowest = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < lowest, float("-inf"))
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            chance = ordered.softmax(-1)
            beyond = chance.cumsum(-1) - chance >= self.top_p
            drop = torch.zeros_like(beyond).scatter(-1, order, beyond)
            logits = logits.masked_fill(drop, float("-inf"))
        return logits.softmax(-1)

    def next(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """One token per row, int64 `[batch]`, from logits `[batch, vocabulary]`."""
        if not self.do_sample:
            return most_likely(logits)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)[:, 0]


def most_likely(logits: Tensor) -> Tensor:
    """The first of the largest of each row, int64 `[...]`, as `logits.argmax(-1)` gives it; many on
    a CPU by NumPy, which takes a fifth of torch's time at most."""
    wide = logits.dtype in (torch.float32, torch.float64) and logits.numel() > _FEW
    if not wide or logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(np.asarray(logits.detach().numpy().argmax(-1)))
