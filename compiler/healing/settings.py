"""What a healing is told: how many tokens to train on, which parameters, how fast."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.compiler.errors import Problem


@dataclass(frozen=True)
class Settings:
    """How a healing trains.

    `tokens` are trained on end to end; `local` by every site alone, before that. `rank` 0 trains
    whole weights, a larger one a product of two factors of that rank that is added to each weight
    (LoRA, Hu et al. 2021) and summed into it at the end. `rate` is the largest step of an entry
    relative to the root mean square of its weight, so that it means the same at every width. `seed`
    decides what is drawn. Raises `Problem` A304 for numbers that mean nothing.
    """

    tokens: int = 200_000
    local: int = 50_000
    rank: int = 0
    rate: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"tokens": self.tokens, "local": self.local, "rank": self.rank}
        for name, value in counts.items():
            if value < 0:
                raise Problem("A304", f"a healing cannot have {value} as its `{name}`")
        if not self.tokens + self.local:
            raise Problem(
                "A304", "a healing needs tokens to train on", help="give it tokens or local tokens"
            )
        if not 0 < self.rate < 1:
            raise Problem(
                "A304",
                f"a rate of {self.rate:g} is not between 0 and 1",
                help="it is the step of an entry relative to its weight's root mean square",
            )
