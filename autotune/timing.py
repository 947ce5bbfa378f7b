"""Paired, interleaved timing: k callables on the same inputs, each round running all of them.

A round times every contender once, in an order that is rotated from round to round and reversed in
every second cycle, so that drift of the machine and the neighbour in the order hit all alike.
Speeds are compared by the ratios within a round, never by times from different moments.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from attnopt.autotune import outputs as out
from attnopt.autotune.environment import environment
from attnopt.autotune.statistics import Interval, Spread, bootstrap, median_of, spread
from attnopt.compiler.device import finish
from attnopt.compiler.errors import Problem
from attnopt.compiler.program import Batch

T = TypeVar("T")
Verdict = Literal["faster", "slower", "inconclusive"]
Progress = Callable[[str, float], None]  # what is being done, and the share done from 0 to 1

_NOT_DATA = ("mask", "position", "type_ids")  # inputs that may rightly be constant or a plain count
_MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Contender:
    """Something to be timed; `model` is called with a batch's arguments."""

    name: str
    model: Callable[..., Any]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast `a` is as `b`: the median of the rounds' ratios time(b) / time(a).

    The verdict says what the interval allows: *faster* when all of it is above 1.
    """

    a: str
    b: str
    interval: Interval
    rounds: int

    @property
    def value(self) -> float:
        """The median ratio; above 1 means that `a` is the faster."""
        return self.interval.value

    @property
    def verdict(self) -> Verdict:
        """*faster*, *slower* or *inconclusive*, of `a` against `b`."""
        if self.interval.low > 1.0:
            return "faster"
        return "slower" if self.interval.high < 1.0 else "inconclusive"

    def as_json(self) -> dict[str, Any]:
        """The ratio as a JSON object."""
        facts = {"of": self.a, "over": self.b, "rounds": self.rounds, "verdict": self.verdict}
        interval = {key: _finite(value) for key, value in self.interval.as_json().items()}
        return {**facts, **interval, "evidence": "measured"}


@dataclass(frozen=True)
class Timing:
    """Samples by contender, in seconds for all batches; sample i of each is round i's."""

    samples: Mapping[str, tuple[float, ...]]
    device: str = "cpu"
    repeats: int = 1
    environment: Mapping[str, Any] = field(default_factory=dict)
    evidence: str = "measured"

    @property
    def rounds(self) -> int:
        """How many rounds were timed."""
        return min(len(taken) for taken in self.samples.values())

    def median(self, name: str) -> float:
        """Median seconds of a contender."""
        return self.spread(name).median

    def spread(self, name: str) -> Spread:
        """Median, quartiles and extremes of a contender, in seconds."""
        return spread(self.samples[name])

    def ratio(self, a: str, b: str, seed: int = 0) -> Ratio:
        """How many times as fast `a` is as `b`, with a bootstrap 95% interval over the rounds."""
        pairs = zip(self.samples[a], self.samples[b], strict=True)
        return Ratio(a, b, bootstrap([y / x for x, y in pairs], median_of, seed=seed), self.rounds)

    def fastest(self, names: Sequence[str] | None = None) -> str:
        """The contender with the smallest median among these (or all)."""
        return min(names or self.samples, key=self.median)

    def as_json(self) -> dict[str, Any]:
        """All samples, their spreads and where they were taken, as a JSON object."""
        return {
            "seconds": {name: self.spread(name).as_json() for name in self.samples},
            "samples": {name: list(taken) for name, taken in self.samples.items()},
            "rounds": self.rounds,
            "repeats": self.repeats,
            "device": self.device,
            "environment": dict(self.environment),
            "evidence": self.evidence,
        }


def compare(
    contenders: Sequence[Contender],
    batches: Sequence[Batch],
    *,
    seconds: float = 10.0,
    rounds: int = 7,
    precision: float = 0.01,
    warmup: int = 2,
    shortest: float = 2e-3,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time the contenders against each other on the batches.

    At least `rounds` rounds are run, whatever they take; then rounds go on until `seconds` are
    spent or every ratio to the first contender is known to `precision` (half of its interval,
    relative). A sample repeats its calls until it lasts `shortest` seconds. Raises `Problem` A403
    on inputs that are constant (zeros run faster than data) and A404 on a contender whose outputs
    are not finite or have other shapes than the first one's.
    """
    if not contenders or not batches:
        raise ValueError("timing needs at least one contender and one batch")
    if len({contender.name for contender in contenders}) < len(contenders):
        raise ValueError("two contenders have one name")
    for batch in batches:
        check_inputs(batch)
    started = clock()
    device = _warm(contenders, batches, warmup)
    repeats = _repeats(contenders, batches, device, shortest, clock)
    taken: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    with no_collection():
        while goes_on(taken, clock() - started, seconds, rounds, precision):
            done = len(taken[contenders[0].name])
            for contender in rotated(contenders, done):
                sample = _sample(contender, batches, device, repeats, clock)
                taken[contender.name].append(sample / repeats)
            if progress is not None:
                share = min((done + 1) / rounds, (clock() - started) / max(seconds, 1e-9))
                progress(f"timing, round {done + 1}", min(1.0, share))
    samples = {name: tuple(values) for name, values in taken.items()}
    return Timing(samples, str(device), repeats, environment())


def check_inputs(batch: Batch) -> None:
    """Refuse a batch whose data is all one value: zeros and constants run faster than real inputs.

    Masks, positions and token types do not count as data. Raises `Problem` A403.
    """
    data = [tensor for tensor in out.tensors(list(batch.args)) if tensor.dtype != torch.bool]
    for name, value in batch.kwargs.items():
        if not any(word in name for word in _NOT_DATA):
            data += [tensor for tensor in out.tensors(value) if tensor.dtype != torch.bool]
    data = [tensor for tensor in data if tensor.numel() > 1]
    if data and any(_varies(tensor) for tensor in data):
        return
    raise Problem(
        "A403",
        "the inputs for timing hold one value only"
        if data
        else "the inputs for timing hold no data",
        why="zeros and constants run faster than data and would flatter every figure",
        help="give real inputs with --inputs FILE or --text FILE",
    )


def _varies(tensor: Tensor) -> bool:
    flat = tensor.detach().reshape(-1)
    return bool((flat != flat[0]).any())


def _warm(contenders: Sequence[Contender], batches: Sequence[Batch], times: int) -> torch.device:
    """Run everything, check what comes out, and find the device that outputs are on."""
    expected: list[list[tuple[int, ...]]] = []
    device = torch.device("cpu")
    for contender in contenders:
        for turn in range(max(1, times)):
            for index, batch in enumerate(batches):
                made = out.call(contender.model, batch)
                if turn:
                    continue
                if len(expected) <= index:
                    expected.append(out.shapes(made))
                _check_outputs(contender.name, made, expected[index], batch)
                device = next((t.device for t in out.tensors(made)), device)
    return device


def _check_outputs(name: str, made: Any, expected: list[tuple[int, ...]], batch: Batch) -> None:
    why = ""
    if out.shapes(made) != expected:
        why = f"its outputs are {out.shapes(made)}, those of the first contender {expected}"
    valid = out.valid_of(batch)
    if not all(bool(out.real(t, valid).isfinite().all()) for t in out.floats(made)):
        why = "its outputs are not finite (NaN or infinity)"
    if why:
        raise Problem("A404", f"`{name}` is not timed: no speed without a correct result", why=why)


def _repeats(
    contenders: Sequence[Contender],
    batches: Sequence[Batch],
    device: torch.device,
    shortest: float,
    clock: Callable[[], float],
) -> int:
    """How often a sample runs its calls, so that the quickest contender's sample is long enough."""
    quickest = min(_sample(contender, batches, device, 1, clock) for contender in contenders)
    return max(1, math.ceil(shortest / max(quickest, 1e-7)))


def _sample(
    contender: Contender,
    batches: Sequence[Batch],
    device: torch.device,
    repeats: int,
    clock: Callable[[], float],
) -> float:
    with torch.no_grad():
        finish(device)
        start = clock()
        for _ in range(repeats):
            for batch in batches:
                contender.model(*batch.args, **batch.kwargs)
        finish(device)
        return clock() - start


def rotated(contenders: Sequence[T], turn: int) -> list[T]:
    """The order of one round: rotated each round, reversed in every second cycle."""
    shift = turn % len(contenders)
    order = [*contenders[shift:], *contenders[:shift]]
    return order[::-1] if (turn // len(contenders)) % 2 else order


def goes_on(
    taken: Mapping[str, Sequence[float]],
    spent: float,
    seconds: float,
    rounds: int,
    precision: float,
) -> bool:
    """Whether another round is run: until `rounds` are done, and then until `seconds` are spent or
    every ratio to the first contender is known to `precision`."""
    names = list(taken)
    done = len(taken[names[0]])
    if done < rounds:
        return True
    if spent >= seconds or done >= _MOST_ROUNDS:
        return False
    if done % rounds:  # looking after every round would take time from the rounds
        return True
    timing = Timing({name: tuple(values) for name, values in taken.items()})
    ratios = [timing.ratio(name, names[0]).interval for name in names[1:]]
    return not ratios or any(r.width / 2 > precision * r.value for r in ratios)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of samples, and out of captures of a graph: freeing a
    kernel of triton there unloads a module, which breaks it."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
