"""The host's time of a dispatched call, all but the launch of its kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

BAR = 20e-6
_PATIENCE = 30.0  # seconds
_KERNELS = (
    "flash_prefill._flash_prefill", "split_decode._split_decode", "merge_partials._merge_partials",
)  # fmt: skip


class _Unlaunched:
    """Stands for a `@triton.jit` function: takes its grid and its arguments, and does nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **constants: Any) -> None:
        self.calls += 1


def without_launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, _Unlaunched]:
    """No kernel is launched in this test, and new memory is not filled; what stands in for each."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    made = {name: _Unlaunched() for name in _KERNELS}
    for name, stub in made.items():
        monkeypatch.setattr(f"attnopt.codegen.kernels.{name}", stub)
    return made


def least_seconds(call: Callable[[], Any]) -> float:
    """The best of many, because others use the machine too: for as long as `_PATIENCE` while that
    is beyond the bar."""
    call()
    best, until = float("inf"), time.monotonic() + _PATIENCE
    while best >= BAR and time.monotonic() < until:
        for _ in range(8000):
            begun = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begun)
    return best
