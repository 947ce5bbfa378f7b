"""Linear biases (ALiBi; Press, Smith and Lewis 2022)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def alibi(logits, b, h, i, j, data):
    """A score hook: slope * (j - i) added, `data` being (slopes, batch and head stride)."""
    slopes = tl.load(data[0] + b * data[1] + h * data[2]).to(tl.float32)
    return logits + slopes * (j - i).to(tl.float32)
