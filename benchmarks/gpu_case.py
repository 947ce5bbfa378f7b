"""One line of the GPU table: contenders on the same inputs, and the bars that they are held to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

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
    least that share of the copy bandwidth, or that many operations per second. Where it is not
    `asked`, the figure is told and nothing hangs on it."""

    least: float
    over: tuple[str, ...] = ()
    of: Literal["speed", "bandwidth", "flops"] = "speed"
    contender: str = OURS
    asked: bool = True

    @property
    def words(self) -> str:
        """The bar as the table says it."""
        if not self.asked:
            return f"{self.contender} against {' or '.join(self.over)}"
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
    are made of several launches for a target. What the contenders named in `same` give is compared
    with ours; `alike` names pairs of others that are compared, the first of which is left out where
    they differ.

    `like` says of contenders which launches of ours have their least work, one after the other: so
    they are estimated. Of the others, `unknown` says why they are not.
    """

    name: str
    kernel: str
    spec: Any
    load: Load
    bars: tuple[Bar, ...]
    peers: Mapping[str, Callable[[], Peer | str]] = field(default_factory=dict)
    own: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    composed: Mapping[str, Callable[[Target, Load], Contender]] = field(default_factory=dict)
    same: tuple[str, ...] = ()
    alike: tuple[tuple[str, str], ...] = ()
    like: Mapping[str, tuple[tuple[str, Any], ...]] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)
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

    def works(self) -> dict[str, tuple[Work, ...]]:
        """The least work of the launches of every contender of which it is known."""
        own = {OURS: (self.kernel, self.spec), **self.own}
        launches = {name: (one,) for name, one in own.items()} | dict(self.like)
        return {
            name: tuple(kernels()[kernel].work(spec, self.load) for kernel, spec in each)
            for name, each in launches.items()
        }

    def estimates(self, target: Target) -> dict[str, float]:
        """Seconds of these contenders by the roofline of the target, but for kernels that are not
        for it; none where it has no peaks. Estimated, never measured."""
        dtype = self.load.dtype if self.load.dtype in target.peak else "float16"
        if dtype not in target.peak or not target.bandwidth:
            return {}
        ours = {OURS: (self.kernel, self.spec), **self.own}
        absent = {
            name
            for name, (kernel, spec) in ours.items()
            if kernels()[kernel].supports(spec, target) is not None
        }
        return {
            name: sum(estimated(work, dtype, target) for work in each)
            for name, each in self.works().items() if name not in absent
        }  # fmt: skip

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
        if self.value is None or not self.bar.asked:
            return None
        return self.value >= self.bar.least


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
    for name, other in (*((name, OURS) for name in case.same), *case.alike):
        if name in running and other in running and (off := _apart(outputs[name], outputs[other])):
            absent[name] = f"computes something else: {off}"
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


def _apart(one: Any, other: Any) -> str:
    """What rounding does not explain of a difference, empty where there is nothing."""
    pairs = [(x if isinstance(x, tuple) else (x,)) for x in (one, other)]
    if [x.shape for x in pairs[0]] != [x.shape for x in pairs[1]]:
        return "another shape"
    off = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(*pairs)]  # noqa: B905
    return "" if all(error <= 0.05 for error in off) else f"{max(off):.1e} apart"


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
