"""One line of the GPU table: contenders on the same inputs, and the bars that they are held to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.codegen.kernel import Kernel, Load, Work, kernels
from attnopt.codegen.roofline import estimated
from attnopt.codegen.shipped import chosen
from attnopt.codegen.target import Target
from benchmarks.gpu_peers import Peer
from benchmarks.gpu_timing import Clock, Times, cuda_clock, sets_beyond, times

OURS = "attnopt"
Given = dict[str, Any]
Contender = Callable[[Given], Any]


@dataclass(frozen=True)
class Bar:
    """What is asked: `contender` at least `least` times as fast as the fastest of `over`, or at
    least that share of the copy bandwidth, or that many operations per second."""

    least: float
    over: tuple[str, ...] = ()
    of: Literal["speed", "bandwidth", "flops"] = "speed"
    contender: str = OURS

    @property
    def words(self) -> str:
        """The bar as the table says it."""
        if self.of == "bandwidth":
            return f"at least {self.least:.0%} of the copy bandwidth"
        if self.of == "flops":
            return f"at least {self.least / 1e12:.0f} TFLOP/s"
        return f"{self.contender} at least {self.least:g}x {' or '.join(self.over)}"


@dataclass(frozen=True)
class Case:
    """A kernel at a size with its bars.

    `peers` are made on the device: each gives a function of the inputs, or the reason why it is not
    here. `own` are further kernels of ours on the same inputs, by name: (kernel, spec). `composed`
    are made of several launches for a target; `parts` are what is estimated where the line is about
    such launches, one after the other. What the contenders named in `same` give is compared with
    ours.
    """

    name: str
    kernel: str
    spec: Any
    load: Load
    bars: tuple[Bar, ...]
    peers: Mapping[str, Callable[[], Peer | str]] = field(default_factory=dict)
    own: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    composed: Mapping[str, Callable[[Target, Load], Contender]] = field(default_factory=dict)
    parts: tuple[tuple[str, Any], ...] = ()
    same: tuple[str, ...] = ()
    prepare: Callable[[Given, Load], Given] | None = None

    @property
    def cls(self) -> type[Kernel[Any]]:
        """The kernel's class."""
        return kernels()[self.kernel]

    def work(self) -> Work:
        """The least work."""
        return self.cls.work(self.spec, self.load)

    def inputs(self, device: str) -> Given:
        """One set of inputs."""
        given = self.cls.inputs(self.spec, self.load, device)
        return self.prepare(given, self.load) if self.prepare else given

    def estimate(self, target: Target) -> tuple[Work, float | None]:
        """The least work, and seconds by the roofline of the target, where its peaks are known.
        Estimated, never measured."""
        done = [kernels()[k].work(spec, self.load) for k, spec in self.parts] or [self.work()]
        whole = Work(sum(w.flops for w in done), sum(w.bytes for w in done))
        dtype = self.load.dtype if self.load.dtype in target.peak else "float16"
        if dtype not in target.peak or not target.bandwidth:
            return whole, None
        return whole, sum(estimated(work, dtype, target) for work in done)

    def contenders(self, target: Target) -> tuple[dict[str, Contender], dict[str, str]]:
        """All that run, and why the others do not."""
        running: dict[str, Contender] = {}
        absent: dict[str, str] = {}
        for name, (kernel, spec) in {OURS: (self.kernel, self.spec), **self.own}.items():
            cls = kernels()[kernel]
            missed = cls.supports(spec, target)
            if missed is None:
                running[name] = _running(chosen(cls, spec, target, self.load), spec)
            else:
                absent[name] = missed.reason
        for name, compose in self.composed.items():
            running[name] = compose(target, self.load)
        for name, make in self.peers.items():
            try:
                peer = make()
            except Exception as error:  # noqa: BLE001 (a peer may fail in any way, and is told)
                peer = _told(error)
            if isinstance(peer, str):
                absent[name] = peer
            else:
                running[name] = peer
        return running, absent


@dataclass(frozen=True)
class Outcome:
    """A bar with the figure that was reached; None where what it compares with is absent."""

    bar: Bar
    value: float | None
    spread: tuple[float, float] | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bar is met, as far as can be said."""
        return None if self.value is None else self.value >= self.bar.least


def measure(
    case: Case,
    target: Target,
    bandwidth: float,
    device: str = "cuda",
    rounds: int = 30,
    clock: Clock = cuda_clock,
) -> tuple[Times, list[Outcome], dict[str, str]]:
    """Time a case. What fails on its first call is left out, with its error."""
    torch._dynamo.reset()  # each line compiles its peers for its own shapes
    running, absent = case.contenders(target)
    first = case.inputs(device)
    outputs = {}
    for name in list(running):
        try:
            outputs[name] = running[name](first)
        except Exception as error:  # noqa: BLE001 (what fails is left out, and told)
            absent[name] = _told(error)
            del running[name]
    for name in case.same:
        if name in running and OURS in running and (off := _apart(outputs[name], outputs[OURS])):
            absent[name] = f"computes something else: {off:.1e} apart"
            del running[name]
    del outputs
    if not running:
        return Times({}), [Outcome(bar, None) for bar in case.bars], absent
    count = sets_beyond(target.l2, case.work().bytes)
    sets: Sequence[Given] = [first, *(case.inputs(device) for _ in range(count - 1))]
    taken = times(running, sets, rounds, clock)
    return taken, [_outcome(case, bar, taken, bandwidth) for bar in case.bars], absent


def _running(kernel: Kernel[Any], spec: Any) -> Contender:
    """The kernel on those of the inputs that its launcher takes."""
    names = set(inspect.signature(type(kernel).launcher).parameters)
    return lambda given: kernel.run(spec, {k: v for k, v in given.items() if k in names})


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _apart(one: Tensor, other: Tensor) -> float:
    """The norm of the difference over the norm, where rounding does not explain it; else 0."""
    error = float((one.float() - other.float()).norm() / other.float().norm())
    return error if not error <= 0.05 else 0.0


def _outcome(case: Case, bar: Bar, taken: Times, bandwidth: float) -> Outcome:
    if bar.contender not in taken.samples:
        return Outcome(bar, None)
    seconds = taken.median(bar.contender)
    if bar.of == "bandwidth":
        return Outcome(bar, case.work().bytes / seconds / bandwidth)
    if bar.of == "flops":
        return Outcome(bar, case.work().flops / seconds)
    there = [name for name in bar.over if name in taken.samples]
    if not there:
        return Outcome(bar, None)
    value, low, high = taken.ratio(bar.contender, taken.fastest(there))
    return Outcome(bar, value, (low, high))
