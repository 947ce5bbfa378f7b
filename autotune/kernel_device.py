"""The device that kernels are timed on: a GPU, or whatever else keeps to `Device`.

Calls are timed on the device's own clock. They are captured in a graph first, so that kernels of a
few microseconds are not timed by how fast the host launches them; what cannot be captured is
launched one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from attnopt.autotune.timing import no_collection
from attnopt.codegen.own_tiles import driver
from attnopt.codegen.target import Target

Sampler = Callable[[], float]
_SHORTEST = 2e-3  # seconds that a sample lasts at least
_MOST_REPEATS = 200
_MEMORY = 0.15  # how far a driver's figure may be off the datasheet's, which counts in other units


class Device(Protocol):
    """What the tuner asks of a device."""

    @property
    def name(self) -> str:
        """The device as its driver calls it."""

    @property
    def driver(self) -> str:
        """The driver and its version."""

    @property
    def where(self) -> str:
        """The device as torch calls it, such as "cuda:0": where inputs are made."""

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What a kernel raises that does not run here."""

    def misfit(self, target: Target) -> str:
        """Why this is not the target, empty where it is."""

    def free(self) -> int:
        """Bytes of memory that are free."""

    def answers(self) -> bool:
        """Whether it still works: an access out of bounds ends a process's use of a GPU."""

    def sampler(self, calls: Sequence[Callable[[], Any]]) -> Sampler:
        """A function that runs all calls, in order, and gives the seconds for one, on average."""


class Gpu:
    """The GPU that torch uses here, of NVIDIA or AMD."""

    def __init__(self) -> None:
        self.where = f"cuda:{torch.cuda.current_device()}"
        self.facts: Any = torch.cuda.get_device_properties(self.where)
        self.name = str(self.facts.name)
        self.driver = driver()
        self._pool: Any = None

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What a kernel raises that does not compile, does not fit or does not run."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import TritonError

        return (CompilationError, TritonError, RuntimeError)

    def misfit(self, target: Target) -> str:
        """Why this GPU is not the target: another architecture, fewer units (a slice of it), or
        another memory."""
        facts, amd = self.facts, torch.version.hip is not None
        here = facts.gcnArchName.split(":")[0] if amd else f"{facts.major}.{facts.minor}"
        if here != target.capability:
            return f"its architecture is {here}, that of {target.title} {target.capability}"
        if facts.multi_processor_count != target.units:
            return f"it has {facts.multi_processor_count} units, {target.title} {target.units}"
        if abs(facts.total_memory / target.memory - 1) > _MEMORY:
            return (
                f"it has {facts.total_memory / 1e9:.0f} GB of memory, {target.title} "
                f"{target.memory / 1e9:.0f} GB"
            )
        return ""

    def free(self) -> int:
        """Bytes of memory that are free."""
        return int(torch.cuda.mem_get_info(self.where)[0])

    def answers(self) -> bool:
        """Whether it still works."""
        try:
            return bool(torch.ones(1, device=self.where).sum().item() == 1)
        except RuntimeError:
            return False

    def sampler(self, calls: Sequence[Callable[[], Any]]) -> Sampler:
        """A sampler of a captured graph of the calls, repeated until a sample is long enough."""
        _run_all(calls)  # it compiles
        once = self._events(lambda: _run_all(calls))()
        runs = [*calls] * min(_MOST_REPEATS, max(1, math.ceil(_SHORTEST / max(once, 1e-6))))
        sample = self._events(self._captured(runs))
        sample()
        return lambda: sample() / len(runs)

    def _captured(self, runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
        """All runs as one graph; or, where they cannot be captured, one by one."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with no_collection(), torch.cuda.graph(graph, pool=self._pool):
                _run_all(runs)
        except RuntimeError:
            torch.cuda.synchronize(self.where)
            return lambda: _run_all(runs)
        return graph.replay

    def _events(self, run: Callable[[], Any]) -> Sampler:
        """A function that runs it and gives the seconds between two events around it."""

        def sample() -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.where)
            begin.record()
            run()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return sample


def gpu_here() -> Gpu | None:
    """The GPU that torch uses here, None without one."""
    return Gpu() if torch.cuda.is_available() else None


def _run_all(calls: Sequence[Callable[[], Any]]) -> None:
    """Run them one after the other, keeping no output: their memory serves the next."""
    for call in calls:
        call()
