"""Latent attention of a few new tokens over a cache of latents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnopt.codegen.kernel import Inputs, Load
from attnopt.codegen.kernels.latent_decode import LatentDecode, latent_decode
from attnopt.codegen.kernels.references import latent_decode as plain
from attnopt.codegen.latent_spec import LatentSpec
from attnopt.codegen.pieces.sizes import two_pieces
from attnopt.codegen.target import target
from attnopt.compiler.errors import Problem
from tests.tolerance import assert_close

SMALL = LatentSpec(4, 32, 16, 16, 16, 0.2)
TILES = LatentDecode(16, 32, 3)


def wide(inputs: Inputs) -> Inputs:
    """The inputs in float64, whole numbers and truth values as they are."""
    return {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}


def agree(spec: LatentSpec, inputs: Inputs, kernel: LatentDecode = TILES) -> Tensor:
    """Run the kernel on the inputs and hold it against the reference."""
    got = kernel.run(spec, inputs)
    want = LatentDecode.reference(spec, wide(inputs))
    assert isinstance(got, Tensor) and isinstance(want, Tensor)
    assert_close(got, want, kernel.text)
    return got


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("keys", [1, 63, 100, 128, 257])
@pytest.mark.parametrize("splits", [1, 2, 7])
def test_every_length_and_number_of_splits(keys: int, splits: int) -> None:
    inputs = LatentDecode.inputs(SMALL, Load(1, 1, keys, "float32"))
    agree(SMALL, inputs, LatentDecode(16, 32, splits))


@pytest.mark.parametrize(
    "rank,rope",
    [
        (16, 16),
        (33, 10),
        (40, 8),
        (57, 20),
        (64, 32),
        (96, 16),
        (100, 20),
        (192, 64),
        (224, 16),
        (512, 64),
    ],
)
def test_ranks_and_rotary_sizes(rank: int, rope: int) -> None:
    spec = LatentSpec(4, rank, rope, 16, 16, rank**-0.5)
    agree(spec, LatentDecode.inputs(spec, Load(1, 1, 100, "float32")), LatentDecode(16, 32, 1))


@pytest.mark.parametrize("heads,queries", [(1, 1), (5, 3), (16, 2), (20, 2), (128, 1)])
def test_heads_and_new_tokens(heads: int, queries: int) -> None:
    spec = replace(SMALL, heads=heads)
    for block_m in (16, 64):
        inputs = LatentDecode.inputs(spec, Load(1, queries, 70, "float32"))
        agree(spec, inputs, LatentDecode(block_m, 32, 2))


@pytest.mark.parametrize("splits,queries", [*((n, 1) for n in range(1, 8)), (1, 4), (3, 4)])
def test_sequences_of_various_lengths_in_one_cache(splits: int, queries: int) -> None:
    inputs = LatentDecode.inputs(SMALL, Load(5, queries, 160, "float32"))
    inputs["lengths"] = lengths(0, 4, 63, 100, 160)
    for b, length in enumerate(inputs["lengths"].tolist()):  # nothing behind a length is read
        inputs["latents"][b, length:] = torch.nan
        inputs["k_rope"][b, length:] = torch.nan
    got = agree(SMALL, inputs, LatentDecode(16, 32, splits))
    assert bool((got[0] == 0).all())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keys", [64, 70])
def test_new_tokens_do_not_read_later_ones_where_causal(keys: int, causal: bool) -> None:
    spec = replace(SMALL, causal=causal)
    inputs = LatentDecode.inputs(spec, Load(1, 3, keys, "float32"))
    want = agree(spec, inputs)
    inputs["k_rope"][:, -1] += 1.0
    changed = ~(agree(spec, inputs) == want).all(3).all(1)[0]
    assert changed.tolist() == [not causal, not causal, True]


@pytest.mark.parametrize("page", [1, 16, 64])
def test_pages(page: int) -> None:
    spec = replace(SMALL, cache="paged", page=page)
    inputs = LatentDecode.inputs(spec, Load(3, 2, 130, "float32"))
    inputs["lengths"] = lengths(130, 0, 65)
    inputs["table"][2, -(-65 // page) :] = 1 << 30  # entries behind a length are not followed
    inputs["table"][1] = 1 << 30
    got = TILES.run(spec, inputs)
    assert isinstance(got, Tensor)
    inputs["table"][inputs["table"] == 1 << 30] = 0
    assert_close(got, agree(spec, inputs))


def test_left_padding_and_padding_masks() -> None:
    inputs = LatentDecode.inputs(SMALL, Load(3, 2, 96, "float32"))
    inputs["starts"] = lengths(0, 37, 94)
    inputs["latents"][1, :37] = torch.nan
    agree(SMALL, inputs)
    inputs["padding"] = torch.rand(3, 96) < 0.8
    inputs["padding"][0] = False
    got = agree(SMALL, inputs)
    assert bool((got[0] == 0).all())


def test_a_rank_in_two_pieces_gives_what_one_padded_piece_gives() -> None:
    assert two_pieces(512) == (512, 0)
    assert two_pieces(192) == (128, 64)
    assert two_pieces(100) == (128, 0)  # 64 and 64 would hold no more
    assert two_pieces(96) == (64, 32)
    assert two_pieces(500) == (512, 0)
    assert two_pieces(8) == (16, 0)
    for size in range(1, 600):
        large, rest = two_pieces(size)
        assert size <= large + rest <= max(16, 2 * size - 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("splits", [1, 3])
def test_half_precisions(dtype: str, splits: int) -> None:
    spec = LatentSpec(16, 96, 16, 16, 16, 0.1)
    got = agree(
        spec, LatentDecode.inputs(spec, Load(2, 1, 100, dtype)), LatentDecode(16, 32, splits)
    )
    assert got.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("splits", [1, 4])
def test_log_sum_exps_and_rows_without_keys(splits: int) -> None:
    inputs = LatentDecode.inputs(SMALL, Load(3, 2, 70, "float32"))
    inputs["lengths"] = lengths(70, 1, 0)
    got = latent_decode(**inputs, scale=0.2, with_lse=True, splits=splits, block_m=16, block_n=16)
    want = plain.latent_decode(**wide(inputs), scale=0.2)
    assert_close(got[0], want[0])
    assert_close(got[1].nan_to_num(neginf=-9.0), want[1].nan_to_num(neginf=-9.0))


def test_absorbing_gives_what_expanding_gives() -> None:
    batch, heads, rank, dim, rope, keys = 2, 3, 24, 16, 8, 50
    latents, k_rope = torch.randn(batch, keys, rank), torch.randn(batch, keys, rope)
    up_k, up_v = torch.randn(heads, dim, rank), torch.randn(heads, dim, rank)
    q, q_rope = torch.randn(batch, heads, 1, dim), torch.randn(batch, heads, 1, rope)
    k = torch.einsum("btr,hdr->bhtd", latents, up_k)
    v = torch.einsum("btr,hdr->bhtd", latents, up_v)
    logits = q @ k.transpose(2, 3) + q_rope @ k_rope[:, None].transpose(2, 3)
    want = (0.05 * logits).softmax(3) @ v
    got = latent_decode(q @ up_k, q_rope, latents, k_rope, scale=0.05, block_m=16, splits=2)
    assert_close(got @ up_v.transpose(1, 2), want)


def test_the_default_fits_into_shared_memory_or_says_that_it_does_not() -> None:
    for name in ("h100", "a100", "l4", "mi300x"):
        spec = LatentSpec(16, 64, 16, 16, 16, 0.2)
        kernel = LatentDecode.default(spec, target(name), Load(1, 1, 128, "float32"))
        assert kernel.units == target(name).units
        agree(spec, LatentDecode.inputs(spec, Load(1, 1, 128, "float32")), kernel)
    large = LatentSpec(128, 512, 64, 128, 128, 0.07)
    assert LatentDecode.supports(large, target("mi300x")) is None
    assert LatentDecode.default(large, target("mi300x"), Load(8)).block_n == 16
    tiny = replace(target("t4"), shared_per_block=30_000)
    miss = LatentDecode.supports(large, tiny)
    assert miss is not None and "do not fit" in miss.reason
    for wrong, why in (({"rank": 2048}, "more than 1024"), ({"scale": 0.0}, "not positive")):
        miss = LatentDecode.supports(replace(large, **wrong), target("h100"))  # type: ignore[arg-type]
        assert miss is not None and why in miss.reason


def test_specs_are_one_line_and_refuse_what_makes_no_sense() -> None:
    spec = replace(SMALL, cache="paged", page=64)
    assert spec.text == (
        "latent{heads=4 rank=32 rope=16 head_dim=16 v_dim=16 scale=0.2 cache=paged page=64}"
    )
    for wrong in ({"rank": 0}, {"cache": "ring"}, {"page": 16}):
        with pytest.raises(Problem) as refused:
            replace(SMALL, **wrong)  # type: ignore[arg-type]
        assert refused.value.code == "A821"


def test_work_reads_the_cache_once_for_all_heads() -> None:
    work = LatentDecode.work(LatentSpec(128, 512, 64, 128, 128, 0.07), Load(2, 1, 1000))
    assert work.bytes == (2 * 1000 * 576 + 2 * 128 * (576 + 512)) * 2
    assert work.flops == 2.0 * 2 * 128 * 1000 * (576 + 512)
