"""A kernel whose launcher is plain torch, compiled and timed by figures that a test sets: what the
tuner is tested with where there is no device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from attnopt.autotune.compile_pool import Compiled, Failed, Job
from attnopt.codegen.aot import Resources
from attnopt.codegen.instructions import Loop
from attnopt.codegen.kernel import Inputs, Kernel, Load, Outputs, Work
from attnopt.codegen.static_score import Static
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss, choice

TILES = (16, 32, 64, 128)


def tripled(x: Tensor, seen: Tensor, *, tile: int, stages: int, broken: dict[int, str]) -> Tensor:
    """Three times x, `tile` rows at a time; tiles that are `broken` do something else."""
    seen += 1
    out = torch.empty_like(x)
    how = broken.get(tile, "")
    if how == "raises":
        raise RuntimeError("too many resources requested for launch")
    rows = x.shape[0] - (1 if how == "leaves the last" else 0)
    for first in range(0, rows, tile):
        out[first : min(first + tile, rows)] = x[first : min(first + tile, rows)] * 3
    if how == "large" and x.shape[0] > 1100:
        out[-1] += 1
    return out


@dataclass(frozen=True)
class TiledSpec:
    """Three times `width` columns; `broken` tiles, as text."""

    width: int
    broken: str = ""
    name: str = field(default="tiled", init=False, repr=False)


@dataclass(frozen=True)
class Tiled(Kernel[TiledSpec]):
    """`tripled` with its tile sizes."""

    name: ClassVar[str] = "tiled"
    launcher = staticmethod(tripled)
    broken: ClassVar[dict[int, str]] = {}

    tile: int = choice(*TILES, default=32)
    stages: int = choice(1, 2, 3, default=2)

    @classmethod
    def supports(cls, spec: TiledSpec, target: Target) -> Miss | None:
        return None if spec.width < 1000 else Miss(f"width {spec.width} is more than 999")

    @classmethod
    def default(cls, spec: TiledSpec, target: Target, load: Load) -> Self:
        return cls()

    @classmethod
    def inputs(cls, spec: TiledSpec, load: Load, device: str = "cpu") -> Inputs:
        x = torch.randn(load.queries, spec.width, dtype=load.torch_dtype, device=device)
        return {"x": x, "seen": torch.zeros((), dtype=torch.int64)}

    def constants(self, spec: TiledSpec) -> Mapping[str, Any]:
        return {"tile": self.tile, "stages": self.stages, "broken": self.broken}

    @classmethod
    def reference(cls, spec: TiledSpec, inputs: Inputs) -> Outputs:
        made: Tensor = inputs["x"] * 3
        return made

    @classmethod
    def work(cls, spec: TiledSpec, load: Load) -> Work:
        return Work(1e9, 1e3)

    @classmethod
    def examples(cls) -> tuple[tuple[TiledSpec, Load], ...]:
        return ((TiledSpec(8), Load(1, 64, 64)),)


Figures = Callable[[Any], Mapping[str, Any] | str]


@dataclass
class Compiler:
    """Stands for the pool: `figures` gives a kernel's `instructions` beside its products,
    `registers`, `shared` and `spills`, or why it does not compile."""

    figures: Figures
    jobs: list[Kernel[Any]] = field(default_factory=list)

    def __call__(self, jobs: Sequence[Job]) -> list[Compiled]:
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> Compiled:
        self.jobs.append(job.kernel)
        given = self.figures(job.kernel)
        if isinstance(given, str):
            return Failed(given, "as a test wants it")
        figures = {"registers": 128, "shared": 1000, "spills": 0, "instructions": 100, **given}
        took = Resources(
            "_k", figures["registers"], figures["spills"], figures["spills"], figures["shared"], 4
        )
        many = figures["instructions"]
        loop = Loop(many, many, 0, 1, 8192, {"float16": 2**18})
        return [Static((1320, 1, 1), 2, took, loop)]


def larger_is_better(kernel: Any) -> Mapping[str, Any]:
    """Figures by which larger tiles and more stages have the better score."""
    return {"instructions": 10_000 // kernel.tile - kernel.stages}


@dataclass
class FakeDevice:
    """Runs on the CPU, and tells times by `seconds` of the calls' kernel and how many samples were
    taken of it before."""

    seconds: Callable[[Any, int], float]
    name: str = "Test device"
    driver: str = "1.2"
    where: str = "cpu"
    not_target: str = ""
    alive: bool = True
    sampled: list[str] = field(default_factory=list)
    ran: int = 0
    errors: tuple[type[Exception], ...] = (RuntimeError,)

    def misfit(self, target: Target) -> str:
        return self.not_target

    def free(self) -> int:
        return 10**9

    def answers(self) -> bool:
        return self.alive

    def sampler(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
        kernel = _kernel_of(calls[0])
        taken = 0
        for call in calls:
            call()
            self.ran += 1

        def sample() -> float:
            nonlocal taken
            taken += 1
            self.sampled.append(kernel.text)
            return self.seconds(kernel, taken)

        return sample


def _kernel_of(call: Callable[[], Any]) -> Any:
    """The kernel that a call runs, from what it holds."""
    held = [cell.cell_contents for cell in call.__closure__ or ()]
    return next(item for item in held if isinstance(item, Kernel))
