"""Where tiles are multiplied one number at a time, they are small; what is too large says so."""

from __future__ import annotations

import math
from typing import Any

import pytest

from attnopt.codegen.kernel import Kernel, Load, kernels
from attnopt.codegen.kernels.latent_decode import LatentDecode
from attnopt.codegen.kernels.linear_chunk import LinearChunk
from attnopt.codegen.kernels.linear_chunk_backward import LinearChunkBackward
from attnopt.codegen.kernels.linear_step import LinearStep
from attnopt.codegen.latent_spec import LatentSpec
from attnopt.codegen.matrix_units import below_ampere, matrix_units
from attnopt.codegen.table import load_on
from attnopt.codegen.target import known, target
from attnopt.compiler.linear_spec import LinearSpec

T4 = target("t4")
AREA = 32 * 32  # rows times keys of the largest tile that 4 warps hold in registers


def test_who_has_matrix_instructions() -> None:
    gpus = [target(name) for name in known() if not target(name).measured]
    assert [on.name for on in gpus if not matrix_units(on, "float16")] == ["t4"]
    assert [on.name for on in gpus if matrix_units(on, "float32")] == ["mi250", "mi300x"]
    assert [on.name for on in gpus if below_ampere(on, "this") is not None] == ["t4"]


def latent(rank: int) -> LatentSpec:
    return LatentSpec(16, rank, 64, 128, 128, 0.07)


@pytest.mark.parametrize(
    ("kernel", "fits", "large", "limit"),
    [
        (LatentDecode, latent(256), latent(512), "a rank of more than 256"),
        (LinearChunk, LinearSpec(4, 4, 64, 64), LinearSpec(4, 4, 128, 64), "more than 64 features"),
        (LinearChunk, LinearSpec(4, 4, 64, 64), LinearSpec(4, 4, 64, 80), "more than 64 features"),
        (
            LinearChunkBackward, LinearSpec(4, 4, 64, 64),
            LinearSpec(4, 4, 64, 64, "softmax", True), "more than 64 features",
        ),
    ],
)  # fmt: skip
def test_what_is_too_large_says_why(
    kernel: type[Kernel[Any]], fits: Any, large: Any, limit: str
) -> None:
    assert kernel.supports(fits, T4) is None
    assert kernel.supports(large, target("l4")) is None
    miss = kernel.supports(large, T4)
    assert miss is not None and limit in miss.reason and "capability 8.0" in miss.reason


def test_a_step_multiplies_no_tiles() -> None:
    assert LinearStep.supports(LinearSpec(4, 4, 128, 128), T4) is None


@pytest.mark.parametrize("on", ["t4", "h100"])
@pytest.mark.parametrize("name", sorted(kernels()))
def test_tiles_are_small_where_numbers_are_multiplied_one_by_one(name: str, on: str) -> None:
    kernel = kernels()[name]
    for spec, load in kernel.examples():
        if kernel.supports(spec, target(on)) is not None:
            continue
        sized = Load(load.batch, load.queries, load.keys, "float32")
        for each in {load_on(load, target(on)), sized}:
            if matrix_units(target(on), each.dtype):
                continue
            made = kernel.default(spec, target(on), each)
            for sides in (("block_m", "block_n"), ("block_c", "block_v")):
                if all(hasattr(made, side) for side in sides):
                    assert math.prod(getattr(made, side) for side in sides) <= AREA
