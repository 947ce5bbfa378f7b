"""Latent attention of many queries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnopt.codegen.kernel import Inputs, Load
from attnopt.codegen.kernels.latent_prefill import LatentPrefill, latent_prefill
from attnopt.codegen.kernels.references import latent_prefill as plain
from attnopt.codegen.latent_spec import LatentSpec
from attnopt.codegen.target import target
from tests.tolerance import assert_close

SMALL = LatentSpec(2, 32, 16, 32, 32, 0.2)
TILES = LatentPrefill(32, 32)


def wide(inputs: Inputs) -> Inputs:
    """The inputs in float64, whole numbers and truth values as they are."""
    return {
        key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in inputs.items()
    }


def agree(spec: LatentSpec, inputs: Inputs, kernel: LatentPrefill = TILES) -> Tensor:
    """Run the kernel on the inputs and hold it against the reference."""
    got = kernel.run(spec, inputs)
    want = LatentPrefill.reference(spec, wide(inputs))
    assert isinstance(got, Tensor) and isinstance(want, Tensor)
    assert_close(got, want, kernel.text)
    return got


@pytest.mark.parametrize("length", [1, 63, 100, 128, 257])
@pytest.mark.parametrize("causal", [True, False])
def test_every_length(length: int, causal: bool) -> None:
    spec = replace(SMALL, causal=causal)
    agree(spec, LatentPrefill.inputs(spec, Load(1, length, length, "float32")))


@pytest.mark.parametrize(
    "head_dim,rope,v_dim",
    [
        (33, 10, 57),
        (40, 8, 40),
        (57, 16, 33),
        (64, 32, 64),
        (80, 20, 48),
        (96, 16, 96),
        (128, 64, 128),
        (192, 64, 40),
    ],
)
def test_sizes_of_heads(head_dim: int, rope: int, v_dim: int) -> None:
    spec = LatentSpec(2, 32, rope, head_dim, v_dim, 0.1)
    agree(spec, LatentPrefill.inputs(spec, Load(1, 63, 63, "float32")))


@pytest.mark.parametrize("queries,keys", [(1, 100), (17, 63), (63, 17), (40, 128)])
def test_queries_behind_a_prefix(queries: int, keys: int) -> None:
    inputs = LatentPrefill.inputs(SMALL, Load(2, queries, keys, "float32"))
    for offset in {0, max(0, keys - queries)}:
        agree(SMALL, {**inputs, "offset": offset})
        agree(SMALL, {**inputs, "offset": offset}, LatentPrefill(16, 64))


def test_padding_and_queries_without_a_key() -> None:
    inputs = LatentPrefill.inputs(SMALL, Load(2, 70, 70, "float32"))
    inputs["padding"] = torch.rand(2, 70) < 0.7
    inputs["padding"][1, :40] = False
    got = agree(SMALL, inputs)
    assert bool((got[1, :, :40] == 0).all())
    got, lse = latent_prefill(**inputs, scale=0.2, with_lse=True, block_m=16, block_n=32)
    want = plain.latent_prefill(**wide(inputs), scale=0.2)
    assert_close(got, want[0])
    assert_close(lse.nan_to_num(neginf=-9.0), want[1].nan_to_num(neginf=-9.0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precisions(dtype: str) -> None:
    spec = LatentSpec(2, 32, 16, 48, 64, 0.1)
    got = agree(spec, LatentPrefill.inputs(spec, Load(1, 63, 63, dtype)))
    assert got.dtype == getattr(torch, dtype)


def test_keys_and_values_may_be_slices_of_one_tensor() -> None:
    inputs = LatentPrefill.inputs(SMALL, Load(2, 50, 50, "float32"))
    want = agree(SMALL, inputs)
    joint = torch.cat([inputs["k_nope"], inputs["v"]], 3).transpose(1, 2).contiguous()
    joint = joint.transpose(1, 2)
    inputs["k_nope"], inputs["v"] = joint[..., :32], joint[..., 32:]
    inputs["k_rope"] = inputs["k_rope"].transpose(2, 3).contiguous().transpose(2, 3)
    got = TILES.run(SMALL, inputs)
    assert isinstance(got, Tensor)
    assert_close(got, want)


def test_defaults_suit_the_target_and_the_length() -> None:
    large = LatentSpec(128, 512, 64, 128, 128, 0.07)
    load = Load(1, 4096, 4096)
    assert LatentPrefill.default(large, target("h100"), load) == LatentPrefill(128, 64, 8, 3)
    assert LatentPrefill.default(large, target("a100"), load) == LatentPrefill(128, 32, 8, 3)
    assert LatentPrefill.default(large, target("mi300x"), load) == LatentPrefill(128, 32, 8, 2)
    short = LatentPrefill.default(SMALL, target("h100"), Load(1, 20, 20, "float32"))
    assert short.block_m == 32
    agree(SMALL, LatentPrefill.inputs(SMALL, Load(1, 20, 20, "float32")), short)


def test_what_is_not_computed_says_why() -> None:
    assert LatentPrefill.supports(SMALL, target("h100")) is None
    for wrong, why in (({"head_dim": 320}, "more than 256"), ({"scale": -1.0}, "not positive")):
        miss = LatentPrefill.supports(replace(SMALL, **wrong), target("h100"))  # type: ignore[arg-type]
        assert miss is not None and why in miss.reason


def test_work_reads_the_shared_part_once() -> None:
    work = LatentPrefill.work(LatentSpec(4, 32, 16, 32, 24, 0.2), Load(2, 10, 10))
    assert work.flops == 2.0 * 2 * 4 * 55 * (48 + 24)
    assert work.bytes == 2 * 2 * (10 * 4 * (48 + 24) + 10 * (4 * (32 + 24) + 16))
