"""Second moments about the mean, streamed in float64.

What all tokens have in common is left out: a constant added to every key cancels in the softmax
(after rotary too), and one added to every value is a bias of the output, because weights add up
to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Centred:
    """Sums over tokens of x and x x^T, for `blocks` separate vectors of `width` each."""

    def __init__(self, blocks: int, width: int) -> None:
        self.x = torch.zeros(blocks, width, dtype=torch.float64)
        self.xx = torch.zeros(blocks, width, width, dtype=torch.float64)
        self.tokens = 0

    def add(self, value: Tensor) -> None:
        """Add tokens `[tokens, blocks, width]` in any floating dtype."""
        wide = value.double().transpose(0, 1)
        self.x += wide.sum(1)
        self.xx.baddbmm_(wide.transpose(1, 2), wide)
        self.tokens += len(value)

    def moment(self) -> Tensor:
        """Sum of (x - mean)(x - mean)^T, `[blocks, width, width]`."""
        mean = self.x / max(1, self.tokens)
        return self.xx - self.tokens * mean[:, :, None] * mean[:, None, :]
