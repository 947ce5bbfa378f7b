"""The contract of a kernel: what it computes, on which inputs, with which tile sizes.

A kernel is a frozen dataclass in one file of `codegen/kernels/`, beside its `@triton.jit` functions
and the launcher that calls them. Its fields are its tile sizes and, through their metadata, what
the tuner may choose. The file is the registration; third parties use the entry-point group
`attnopt.kernels`. Everything here needs triton, which `attnopt[gpu]` brings.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from itertools import product
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from attnopt.codegen.target import Target
from attnopt.compiler import text
from attnopt.compiler.contract import Miss, choice
from attnopt.compiler.errors import Problem

SpecT = TypeVar("SpecT")
Inputs = dict[str, Any]
Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Load:
    """The sizes that a kernel runs at: `queries` new tokens of each of `batch` sequences against
    `keys` in all, in `dtype` ("bfloat16")."""

    batch: int = 1
    queries: int = 1024
    keys: int = 1024
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


@dataclass(frozen=True)
class Work:
    """What a launch has to do at least: floating-point operations (a multiply-add is two) and bytes
    between the device's memory and its processors, every tensor once."""

    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class CompilerOptions:
    """What a kernel may tell Triton's compiler beside warps and stages; 0 leaves it to the
    compiler. Kernels that inherit it before `Kernel` hand `compiler` to their launcher.

    `maxnreg` registers at most for a thread, so that more blocks share a processor. On AMD,
    `waves_per_eu` waves share a unit's registers, and matrix instructions multiply tiles of
    `matrix_instr_nonkdim` rows and columns.
    """

    maxnreg: int = choice(0, 96, 128, 168, 224, default=0, vendor="nvidia")
    waves_per_eu: int = choice(0, 1, 2, 3, 4, default=0, vendor="amd")
    matrix_instr_nonkdim: int = choice(0, 16, 32, default=0, vendor="amd")

    @property
    def compiler(self) -> tuple[tuple[str, int], ...]:
        """Those that are set, by name: one vendor's compiler refuses the other's."""
        given = ((name, getattr(self, name)) for name in CompilerOptions.__dataclass_fields__)
        return tuple((name, value) for name, value in given if value)


@dataclass(frozen=True)
class Kernel(ABC, Generic[SpecT]):
    """One kernel with its tile sizes. Subclasses are frozen dataclasses with a `name`.

    `launcher` is a plain function of the kernel's own module: it allocates the outputs and launches
    `@triton.jit` functions. It may use nothing but torch, triton and what it imports by name from
    `attnopt.codegen`, so that `link` can write it as a module that stands alone.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""  # the paper whose algorithm it is
    launcher: ClassVar[Callable[..., Outputs]]

    @classmethod
    @abstractmethod
    def supports(cls, spec: SpecT, target: Target) -> Miss | None:
        """None, or why this kernel does not compute the spec on the target."""

    @classmethod
    @abstractmethod
    def default(cls, spec: SpecT, target: Target, load: Load) -> Self:
        """Tile sizes that are good without tuning; always a contender."""

    @classmethod
    @abstractmethod
    def inputs(cls, spec: SpecT, load: Load, device: str = "cpu") -> Inputs:
        """Random inputs by the launcher's parameter names; on "meta", shapes without values."""

    @abstractmethod
    def constants(self, spec: SpecT) -> Mapping[str, Any]:
        """The launcher's other arguments, fixed by the spec and the tile sizes: numbers, words,
        booleans and tuples of them."""

    @classmethod
    @abstractmethod
    def reference(cls, spec: SpecT, inputs: Inputs) -> Outputs:
        """What the launcher returns, in plain torch and in the dtype of the inputs."""

    @classmethod
    @abstractmethod
    def work(cls, spec: SpecT, load: Load) -> Work:
        """The least work at these sizes."""

    @classmethod
    @abstractmethod
    def examples(cls) -> tuple[tuple[SpecT, Load], ...]:
        """Typical specs with sizes, head_dim 64 and 128 among them: what is compiled ahead of time
        for every target, and estimated."""

    def waste(self, spec: SpecT, load: Load) -> float:
        """How many times the least arithmetic these tile sizes make it do, at least 1: rows of
        padding, and masked parts of tiles. Only tile sizes of one kernel are ranked by it."""
        return 1.0

    def run(self, spec: SpecT, inputs: Inputs) -> Outputs:
        """Launch on the inputs. Raises `Problem` A828 where a gradient would get lost."""
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in inputs.values()
        ):
            raise Problem(
                "A828",
                f"`{self.name}` launched by itself gives no gradients",
                why="an input requires one, and gradients are enabled",
                help="use torch.no_grad(), or flash_attention and linear_attention of "
                "attnopt.codegen, which give gradients",
            )
        return type(self).launcher(**inputs, **self.constants(spec))

    @property
    def text(self) -> str:
        """The kernel with its tile sizes as `name{key=value ...}`."""
        return text.dump(self)

    @classmethod
    def space(cls, target: Target | None = None) -> dict[str, tuple[Any, ...]]:
        """What the tuner may choose: for each field declared by `choice`, its values; on a target,
        those of another `vendor` keep their default."""
        found = {}
        for name, declared in cls.__dataclass_fields__.items():
            if "choices" in (facts := declared.metadata):
                other = target is not None and facts.get("vendor", target.vendor) != target.vendor
                found[name] = (declared.default,) if other else facts["choices"]
        return found

    @classmethod
    def every(cls) -> Iterator[Self]:
        """All combinations of the space."""
        names, values = list(cls.space()), list(cls.space().values())
        for chosen in product(*values):
            yield cls(**dict(zip(names, chosen, strict=True)))


def require_triton() -> None:
    """Raises `Problem` A801 where triton is not installed."""
    if find_spec("triton") is None:
        raise Problem(
            "A801",
            "triton is not installed",
            why="kernels are written in Triton; torch's CPU wheels come without it",
            help="pip install 'attnopt[gpu]' (Linux on x86-64); no GPU is needed to compile",
        )


@lru_cache(maxsize=1)
def kernels() -> dict[str, type[Kernel[Any]]]:
    """All kernels by name: every module of `codegen/kernels/`, and the entry points
    `attnopt.kernels`. Raises `Problem` A801 without triton."""
    require_triton()
    package = importlib.import_module("attnopt.codegen.kernels")
    found: dict[str, type[Kernel[Any]]] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda item: item.name):
        if info.ispkg:
            continue
        module = importlib.import_module(f"attnopt.codegen.kernels.{info.name}")
        for item in vars(module).values():
            if _is_kernel(item) and item.__module__ == module.__name__:
                found[item.name] = item
    for entry in entry_points(group="attnopt.kernels"):
        loaded = entry.load()
        found[loaded.name] = loaded
    return found


def read_kernel(line: str) -> Kernel[Any]:
    """A kernel from its text, e.g. `flash_prefill{block_m=128 block_n=64 warps=4 stages=3}`.

    Raises `Problem` A802 on an unknown name or value, A601 on an unknown option.
    """
    call = text.parse(line)
    known = kernels()
    if call.name not in known:
        raise Problem(
            "A802",
            f"unknown kernel `{call.name}`",
            help=f"known kernels: {', '.join(sorted(known))}",
        )
    cls = known[call.name]
    for key, values in cls.space().items():
        if key in call.values and call.values[key] not in values:
            raise Problem(
                "A802",
                f"`{key}` of `{call.name}` cannot be {call.values[key]!r}",
                help=f"one of {', '.join(map(str, values))}",
            )
    return text.build(cls, call.values, call.name)


def _is_kernel(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, Kernel) and "name" in vars(item)
