"""The GPU as the tuner asks for it, with torch's calls replaced by what a test says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnopt.autotune.kernel_device import Gpu, gpu_here
from attnopt.codegen.target import target

_H100 = {
    "name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "multi_processor_count": 132,
    "total_memory": 85_000_000_000,
}  # fmt: skip


class _Clock:
    """Time as the device's events tell it: launches take a millisecond each, replays half."""

    def __init__(self, captures: bool) -> None:
        self.now, self.captures, self.capturing = 0.0, captures, False
        self.captured = 0

    def call(self) -> None:
        if self.capturing:
            self.captured += 1
        else:
            self.now += 1.0

    def event(self, enable_timing: bool) -> Any:
        clock, event = self, SimpleNamespace(at=0.0)

        def record() -> None:
            event.at = clock.now

        event.record, event.synchronize = record, lambda: None
        event.elapsed_time = lambda later: later.at - event.at
        return event

    def graph(self) -> Any:
        def replay() -> None:
            self.now += 0.5 * self.captured

        return SimpleNamespace(replay=replay)

    @contextmanager
    def capture(self, graph: Any, pool: Any) -> Iterator[None]:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = True
        yield
        self.capturing = False


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An H100 as its driver tells of it."""
    made = SimpleNamespace(**_H100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: made)
    return made


def _timed(monkeypatch: pytest.MonkeyPatch, captures: bool) -> _Clock:
    clock = _Clock(captures)
    for name, value in (
        ("Event", clock.event), ("CUDAGraph", clock.graph), ("graph", clock.capture),
        ("graph_pool_handle", lambda: (0, 1)), ("synchronize", lambda device: None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return clock


def test_without_a_gpu_there_is_none() -> None:
    if not torch.cuda.is_available():
        assert gpu_here() is None


def test_a_gpu_knows_whether_it_is_the_target(facts: SimpleNamespace) -> None:
    device = gpu_here()
    assert device is not None and device.name == "NVIDIA H100 80GB HBM3"
    assert not device.misfit(target("h100"))
    assert "85 GB" in device.misfit(target("h200"))
    assert "its architecture is 9.0" in device.misfit(target("a100"))
    facts.multi_processor_count = 114
    assert "114 units" in device.misfit(target("h100"))


def test_calls_are_timed_as_a_graph(
    facts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = _timed(monkeypatch, captures=True)
    sample = Gpu().sampler([clock.call] * 3)
    assert clock.captured == 3  # one pass lasts long enough
    before = clock.now
    assert sample() == pytest.approx(0.5e-3)
    assert clock.now - before == 1.5


def test_short_calls_are_repeated(facts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _timed(monkeypatch, captures=True)
    Gpu().sampler([clock.call])
    assert clock.captured == 2  # a sample lasts two milliseconds


def test_what_cannot_be_captured_is_launched(
    facts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = _timed(monkeypatch, captures=False)
    assert Gpu().sampler([clock.call] * 3)() == pytest.approx(1e-3)


def test_a_device_that_raises_does_not_answer(
    facts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ones(*given: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    device = Gpu()
    monkeypatch.setattr(device, "where", "cpu")
    assert device.answers()
    monkeypatch.setattr(torch, "ones", ones)
    assert not device.answers()
