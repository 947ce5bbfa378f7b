"""The frequencies of a model's rotary embedding where a plan kept some of them in each layer.

A config has one list of frequencies, theta^(-2 i / dims) unless it scales them. Where the kept ones
are such a list, that is what is written; any other list is written as factors on it ("longrope",
with the same factors at all lengths).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_SAME = 1e-4  # of a frequency: what a probe may be off; neighbours differ by far more
_ROUNDINGS = 8  # how many neighbours of a factor are tried
_ELEMENTWISE = ("default", "linear", "llama3")  # scalings that look at each frequency alone


def model_frequencies(hf: nn.Module, probed: Tensor) -> Tensor:
    """Probed frequencies `[slots]` as the model itself has them in a buffer, float64; as probed
    where it has none near."""
    tables = [b for name, b in hf.named_buffers() if name.endswith("inv_freq") and b.dim() == 1]
    made = probed.clone()
    for at, value in enumerate(probed):
        known = torch.cat([table.double().cpu() for table in tables] or [probed[:0]])
        near = known[(known - value).abs() <= _SAME * value]
        if len(near):
            made[at] = near[(near - value).abs().argmin()]
    return made


def together(layers: Iterable[Tensor]) -> Tensor:
    """The fewest frequencies that hold those of every layer, each as often as one layer has it;
    falling."""
    most: Counter[float] = Counter()
    for frequencies in layers:
        most |= Counter(frequencies.tolist())
    return torch.tensor(sorted(most.elements(), reverse=True), dtype=torch.float64)


def places(frequencies: Tensor, every: Tensor) -> Tensor:
    """Where each slot of a layer lies among all, int64 `[slots]`."""
    free: dict[float, list[int]] = {}
    for at, value in enumerate(every.tolist()):
        free.setdefault(value, []).append(at)
    return torch.tensor([free[value].pop(0) for value in frequencies.tolist()], dtype=torch.int64)


def rope(
    given: dict[str, Any], every: Tensor, longest: int, table: Callable[[dict[str, Any]], Tensor]
) -> dict[str, Any]:
    """The `rope_parameters` with which a model has these frequencies.

    `given` are those of the original, `table` the frequencies that stock code makes of some.
    """
    theta = float(given.get("rope_theta") or 10_000.0)
    kind = str(given.get("rope_type", "default"))
    tries: list[dict[str, Any]] = [{"rope_type": "default", "rope_theta": theta}]
    if kind in _ELEMENTWISE:
        kept = {k: v for k, v in given.items() if k != "partial_rotary_factor"}
        tries.insert(0, {**kept, "rope_theta": theta})
    for parameters in tries:
        if bool(((table(parameters).double() - every).abs() <= 1e-6 * every).all()):
            return parameters
    return _factors(theta, every, longest)


def _factors(theta: float, every: Tensor, longest: int) -> dict[str, Any]:
    dims = 2 * len(every)
    base = theta ** (torch.arange(0, dims, 2).float() / dims)
    wanted = every.float()
    best = (1.0 / wanted.double() / base.double()).float()
    up, down = best, best
    for _ in range(_ROUNDINGS):  # the same frequencies to the last bit, where float32 allows it
        up, down = (torch.nextafter(x, torch.tensor(to)) for x, to in ((up, 1e30), (down, 0.0)))
        for tried in (up, down):
            off, least = ((1.0 / (x * base) - wanted).abs() for x in (tried, best))
            best = torch.where(off < least, tried, best)
    factors = [float(x) for x in best]
    return {
        "rope_type": "longrope", "rope_theta": theta, "short_factor": factors,
        "long_factor": factors, "factor": 1.0, "attention_factor": 1.0,
        "original_max_position_embeddings": longest,
    }  # fmt: skip
