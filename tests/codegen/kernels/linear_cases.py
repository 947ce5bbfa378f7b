"""Inputs of linear attention and what is held against its kernels, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.linear_chunk import LinearChunk
from attnopt.compiler.linear_spec import LinearSpec
from tests.tolerance import assert_close


@pytest.fixture
def products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bfloat16 as the whole numbers of its bits, and multiplies those:
    they are widened first."""
    product = interpreter.InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b))
        return product(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def spec_of(heads: int = 2, kv_heads: int = 2, dim: int = 32, **others: Any) -> LinearSpec:
    """A spec whose values are as wide as its keys, unless `value_dim` says otherwise."""
    given = {"value_dim": dim, "scale": dim**-0.5, **others}
    return LinearSpec(heads, kv_heads, dim, **given)


def tame(inputs: dict[str, Any]) -> dict[str, Any]:
    """Values of order one: sums over many tokens are then of a size that tolerances are meant
    for."""
    tokens = inputs["v"].shape[2]
    return {**inputs, "v": inputs["v"] / max(1.0, tokens**0.5 / 4)}


def exact(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in float64."""
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def check(spec: LinearSpec, kernel: LinearChunk, load: Load) -> None:
    """The kernel's outputs agree with the reference's."""
    inputs = tame(LinearChunk.inputs(spec, load))
    got, wanted = kernel.run(spec, inputs), LinearChunk.reference(spec, exact(inputs))
    got = got if isinstance(got, tuple) else (got,)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    assert len(got) == len(wanted) == (1 if not spec.final else 2 + spec.normalised)
    assert got[0].dtype == load.torch_dtype
    assert all(x.dtype == torch.float32 for x in got[1:])
    for x, y in zip(got, wanted, strict=True):
        # A state is rounded where it was summed, however many tokens went into it.
        size = max(1.0, float(y.abs().max())) if y is not wanted[0] else 1.0
        error = load.torch_dtype if y is not wanted[0] else x.dtype
        assert_close((x / size).to(error), y / size, spec.text)
