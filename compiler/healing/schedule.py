"""The optimiser and its pace: AdamW in float32 (Loshchilov and Hutter 2019), a linear warm-up, then
half a cosine to zero (Loshchilov and Hutter 2017, "SGDR", equation 5, without restarts)."""

from __future__ import annotations

import math
from typing import Any

import torch

WARM_UP = 0.05  # share of the steps
BETAS = (0.9, 0.99)


def optimizer(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW without decay: what is trained should stay near where it starts, not near zero."""
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)


def share(step: int, steps: int) -> float:
    """The learning rate at a step from 0 to steps - 1, as a share of its peak."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def pace(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Set the learning rates of one step."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share(step, steps)
