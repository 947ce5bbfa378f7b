"""What is trained: float32 masters of whole weights, or low-rank changes of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler.healing.settings import Settings

_LEAST = 1e-4  # root mean square that a weight of zeros is taken to have


class Factors:
    """The trainable form of named weights.

    Whole weights are trained as float32 copies. With a rank r, a matrix W `[out, in]` is
    W + B A, where A `[r, in]` is drawn and B `[out, r]` starts at zero (LoRA, Hu et al. 2021,
    section 4.1); vectors, and matrices that are no larger than r, stay whole.
    """

    def __init__(self, weights: Mapping[str, Tensor], settings: Settings) -> None:
        self.settings = settings
        self.base = {name: value.detach() for name, value in weights.items()}
        self.held: dict[str, Tensor] = {}
        draw = torch.Generator().manual_seed(settings.seed)
        for name, value in self.base.items():
            if not self._factored(value):
                self.held[name] = value.float().clone()
                continue
            rows, columns = value.shape
            drawn = torch.randn(settings.rank, columns, generator=draw) / math.sqrt(columns)
            self.held[f"{name}:a"] = drawn.to(value.device)
            self.held[f"{name}:b"] = torch.zeros(rows, settings.rank, device=value.device)
        for tensor in self.held.values():
            tensor.requires_grad_(True)

    def _factored(self, value: Tensor) -> bool:
        return value.dim() == 2 and 0 < self.settings.rank < min(value.shape)

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(tensor.numel() for tensor in self.held.values())

    def weights(self, names: Iterable[str] | None = None, dtype: Any = None) -> dict[str, Tensor]:
        """The named weights (all of them) as they stand, differentiable, in their own dtype or
        another."""
        chosen = self.base if names is None else names
        return {name: self._weight(name).to(dtype or self.base[name].dtype) for name in chosen}

    def _weight(self, name: str) -> Tensor:
        if name in self.held:
            return self.held[name]
        change = self.held[f"{name}:b"] @ self.held[f"{name}:a"]
        return self.base[name].float() + change

    def merged(self) -> dict[str, Tensor]:
        """All weights in their own dtype, with nothing left to add."""
        with torch.no_grad():
            return {name: value.clone() for name, value in self.weights().items()}

    def groups(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser, each with the learning rate `peak` that moves an entry
        of its weight by `rate` of the weight's root mean square."""
        found = []
        for name in names:
            rms = max(float(self.base[name].float().square().mean().sqrt()), _LEAST)
            step = self.settings.rate * rms
            if name in self.held:
                found.append({"params": [self.held[name]], "peak": step})
                continue
            rank, columns = self.held[f"{name}:a"].shape
            for part, peak in (
                ("b", step * math.sqrt(columns / rank)),
                ("a", self.settings.rate / math.sqrt(columns)),
            ):
                found.append({"params": [self.held[f"{name}:{part}"]], "peak": peak})
        return [{**group, "lr": 0.0} for group in found]

    def state(self) -> dict[str, Tensor]:
        """A copy of what is trained, as it stands."""
        return {name: tensor.detach().clone() for name, tensor in self.held.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a state."""
        with torch.no_grad():
            for name, tensor in self.held.items():
                tensor.copy_(state[name])
