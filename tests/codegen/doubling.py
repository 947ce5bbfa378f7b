"""The smallest kernel, to emit and to compile: 2 x, or what a hook makes of x."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.kernel import Inputs, Kernel, Load, Outputs, Work
from attnopt.codegen.pieces.sizes import padded_size
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss, choice

# What is added to each number.
ZERO: tl.constexpr = tl.constexpr(0.0)
UNREACHED = 5


@triton.jit
def halved(x, data):
    """Half of x."""
    return x * 0.5 + ZERO


@triton.jit
def _double(x, out, size, stride, factor, data, HOOK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.load(x + at * stride, mask=at < size, other=0.0).to(tl.float32)
    tile = HOOK(tile, data) if HOOK is not None else tile * factor + ZERO
    tl.store(out + at, tile.to(out.dtype.element_ty), mask=at < size)


def double(
    x: Tensor, factor: float, hook: Any = None, data: Any = None, *, block: int = 64, warps: int = 1
) -> Tensor:
    """x times a factor.

    x `[n]`, of any stride; the result is dense.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(block, padded_size(x.shape[0]))
    grid = (triton.cdiv(x.shape[0], block),)
    _double[grid](
        x, out, x.shape[0], x.stride(0), factor, data, HOOK=hook, BLOCK=block, num_warps=warps
    )
    return out


def shifted(x: Tensor, factor: float, *, block: int = 64, warps: int = 1) -> Tensor:
    """x times a factor, and what torch adds to it."""
    return double(x[:], factor, block=block, warps=warps) + torch.zeros(1, device=x.device)


@dataclass(frozen=True)
class Doubling(Kernel[float]):
    """`double` with its tile sizes; the spec is the factor."""

    name: ClassVar[str] = "double"
    launcher = staticmethod(double)

    block: int = choice(32, 64, 128, default=64)
    warps: int = choice(1, 2, default=1)

    @classmethod
    def supports(cls, spec: float, target: Target) -> Miss | None:
        return None if spec > 0 else Miss("the factor is not positive")

    @classmethod
    def default(cls, spec: float, target: Target, load: Load) -> Self:
        return cls()

    @classmethod
    def inputs(cls, spec: float, load: Load, device: str = "cpu") -> Inputs:
        return {"x": torch.randn(load.keys, dtype=load.torch_dtype, device=device)}

    def constants(self, spec: float) -> Mapping[str, Any]:
        return {"factor": spec, "block": self.block, "warps": self.warps}

    @classmethod
    def reference(cls, spec: float, inputs: Inputs) -> Outputs:
        made: Tensor = inputs["x"] * spec
        return made

    @classmethod
    def work(cls, spec: float, load: Load) -> Work:
        return Work(float(load.keys), 2.0 * load.keys * load.torch_dtype.itemsize)

    @classmethod
    def examples(cls) -> tuple[tuple[float, Load], ...]:
        return ((2.0, Load(1, 1000, 1000)),)
