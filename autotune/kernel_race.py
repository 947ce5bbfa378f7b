"""Kernels with various tile sizes against each other on a device: first whether they are right, and
then how fast.

Outputs are poisoned with NaN before they are written, so that what a kernel leaves out shows. They
are held against the reference in float64 at odd sizes that it can be computed at, and against each
other at the sizes that are timed. Timing is paired, interleaved and rotates among sets of inputs
that together exceed the second-level cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

from attnopt.autotune.environment import environment
from attnopt.autotune.kernel_device import Device, Sampler
from attnopt.autotune.timing import Timing, goes_on, rotated
from attnopt.codegen.kernel import Inputs, Kernel, Load
from attnopt.codegen.target import Target
from attnopt.compiler.errors import Problem

_EPS = {"float32": 5e-6, "tf32": 1e-3, "float16": 1e-3, "bfloat16": 8e-3}
_ROUNDINGS = 4  # of which one result is made, at most
_ODD = Load(batch=2, queries=1100, keys=1100)  # sizes that the reference is computed at, at most
_ODD_KEYS = 4100  # the same of keys that are not the queries
_MOST_SETS = 256
_PRECISION = 0.005


@dataclass(frozen=True)
class Failing:
    """Tile sizes that do not come to a time: in few words, and what was seen."""

    why: str
    said: str = ""


@dataclass
class Track:
    """A kernel's spec and sizes on a device, with sets of inputs."""

    cls: type[Kernel[Any]]
    spec: Any
    load: Load
    target: Target
    device: Device
    seed: int = 0
    sets: list[Inputs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.odd = odd_sizes(self.load)
        self.odd_inputs = self._inputs(self.odd, 0)
        wide = {key: _map(_wide, value) for key, value in self.odd_inputs.items()}
        self.wanted = _outputs(self.cls.reference(self.spec, wide))
        first = self._inputs(self.load, 1)
        count = set_count(first, self.target.l2, self.device.free())
        self.sets = [first, *(self._inputs(self.load, 2 + i) for i in range(count - 1))]
        self.agreed: list[Tensor] | None = None  # outputs of the first set, of who was right first

    def wrong(self, kernel: Kernel[Any]) -> Failing | None:
        """None where the kernel computes what it should, else what is wrong."""
        allowed = _ROUNDINGS * _EPS[_precision(kernel, self.spec, self.load)]
        try:
            with poisoned():
                made = _outputs(kernel.run(self.spec, _copied(self.odd_inputs)))
                full = _outputs(kernel.run(self.spec, _copied(self.sets[0])))
        except self.device.errors as error:
            said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            self._answers(kernel, said)
            return Failing("fails on the device", said)
        seen = difference([t.cpu() for t in made], self.wanted, allowed)
        if not seen and any(bool(t.isnan().any()) for t in full):
            seen = f"not a number at {self.load}"
        if not seen and self.agreed is not None:
            seen = difference(full, self.agreed, 2 * allowed)
        if seen:
            return Failing("wrong on the device", seen)
        if self.agreed is None:
            self.agreed = full
        return None

    def sampler(self, kernel: Kernel[Any]) -> Sampler:
        """What times the kernel over all sets of inputs."""

        def call(inputs: Inputs) -> Callable[[], Any]:
            return lambda: kernel.run(self.spec, inputs)

        return self.device.sampler([call(inputs) for inputs in self.sets])

    def _answers(self, kernel: Kernel[Any], said: str) -> None:
        if not self.device.answers():
            raise Problem(
                "A836", f"{self.device.name} does not answer any more after {kernel.text}",
                why=said, help="leave these tile sizes out of the kernel's space, and run again",
            )  # fmt: skip

    def _inputs(self, load: Load, turn: int) -> Inputs:
        with torch.random.fork_rng(enabled=True):
            torch.manual_seed(1000 * self.seed + turn)
            return self.cls.inputs(self.spec, load, self.device.where)


def race(
    samplers: Mapping[str, Sampler],
    *,
    seconds: float,
    rounds: int,
    clock: Callable[[], float] = time.monotonic,
) -> Timing:
    """Time all against each other, in rounds of one sample each, in an order that rotates: at least
    `rounds`, then until `seconds` are spent or all ratios to the first are known to half a per
    cent."""
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    started, names = clock(), list(samplers)
    while goes_on(taken, clock() - started, seconds, rounds, _PRECISION):
        for name in rotated(names, len(taken[names[0]])):
            taken[name].append(samplers[name]())
    return Timing({k: tuple(v) for k, v in taken.items()}, "device", 1, environment())


def odd_sizes(load: Load) -> Load:
    """Sizes of the same kind (as many queries as keys, or fewer) at which the reference can be
    computed; where they are cut they are multiples of no tile."""
    batch, queries = min(load.batch, _ODD.batch), min(load.queries, _ODD.queries)
    keys = min(load.keys, _ODD.keys if load.queries == load.keys else _ODD_KEYS)
    return replace(load, batch=batch, queries=queries, keys=max(keys, queries))


def set_count(inputs: Inputs, l2: int, free: int) -> int:
    """How many sets of inputs together are twice the cache, at least two, as far as a third of the
    free memory goes."""
    size = max(1, sum(t.numel() * t.element_size() for t in _tensors(inputs.values())))
    return max(2, min(math.ceil(2 * l2 / size), free // (3 * size), _MOST_SETS))


def difference(made: Sequence[Tensor], wanted: Sequence[Tensor], allowed: float) -> str:
    """What differs by more than `allowed` of an element and of the root mean square of all, in
    words; empty where nothing does."""
    if [t.shape for t in made] != [t.shape for t in wanted]:
        return f"shapes {[tuple(t.shape) for t in made]}, not {[tuple(t.shape) for t in wanted]}"
    pairs = zip(made, wanted, strict=True)
    for place, (a, b) in enumerate((a.double(), b.double()) for a, b in pairs):
        finite = b[b.isfinite()]
        scale = float(finite.square().mean().sqrt()) if finite.numel() else 0.0
        close = torch.isclose(a, b, rtol=allowed, atol=allowed * scale)
        if not bool(close.all()):
            count = int((~close).sum())
            worst = float((a - b).abs()[~close].nan_to_num(math.inf, posinf=math.inf).max())
            return f"output {place}: {count} of {close.numel()} numbers are off, by up to {worst:g}"
    return ""


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it, memory that torch hands out is filled with NaN."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]


def _precision(kernel: Kernel[Any], spec: Any, load: Load) -> str:
    asked = kernel.constants(spec).get("precision")
    return "tf32" if load.dtype == "float32" and asked == "tf32" else load.dtype


def _outputs(made: Any) -> list[Tensor]:
    return [t.detach() for t in _tensors([made])]


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _wide(tensor: Tensor) -> Tensor:
    """On the CPU, where references run."""
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def _copied(inputs: Inputs) -> Inputs:
    """Inputs of their own: a kernel may write to some."""
    return {key: _map(_clone, value) for key, value in inputs.items()}


def _clone(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.preserve_format)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(change, item) for item in value)
    return value
