"""Attention of a few new tokens over a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.decode_spec import DecodeSpec
from attnopt.codegen.kernel import Inputs, Load
from attnopt.codegen.kernels.flash_prefill import mask_arguments
from attnopt.codegen.kernels.references import split_decode as plain
from attnopt.codegen.kernels.split_decode import SplitDecode, split_decode
from attnopt.codegen.pieces.splits import split_count
from attnopt.codegen.target import target
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask
from tests.tolerance import assert_close

TILES = SplitDecode(32, 3)


def wide(inputs: Inputs) -> Inputs:
    """The inputs in float64, whole numbers and truth values as they are."""
    return {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}


def agree(spec: DecodeSpec, inputs: Inputs, kernel: SplitDecode = TILES) -> Tensor:
    """Run the kernel on the inputs and hold it against the reference."""
    got = kernel.run(spec, inputs)
    assert isinstance(got, Tensor)
    want = SplitDecode.reference(spec, wide(inputs))
    assert isinstance(want, Tensor)
    assert_close(got, want, kernel.text)
    return got


def grouped(heads: int = 4, kv_heads: int = 1, dim: int = 32, **changes: Any) -> AttentionSpec:
    """A small attention with causal mask."""
    spec = AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5, CAUSAL)
    return replace(spec, **changes)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("keys", [1, 63, 100, 128, 257])
@pytest.mark.parametrize("splits", [1, 2, 7])
def test_every_length_and_number_of_splits(keys: int, splits: int) -> None:
    spec, load = DecodeSpec(grouped()), Load(1, 1, keys, "float32")
    agree(spec, SplitDecode.inputs(spec, load), SplitDecode(32, splits))


@pytest.mark.parametrize("dim", [32, 33, 40, 57, 64, 80, 96, 128, 192, 256])
def test_head_dims(dim: int) -> None:
    spec, load = DecodeSpec(grouped(dim=dim)), Load(1, 1, 100, "float32")
    agree(spec, SplitDecode.inputs(spec, load))


def test_values_of_another_width() -> None:
    for head_dim, v_dim in ((64, 24), (40, 128)):
        spec = DecodeSpec(grouped(dim=head_dim, v_dim=v_dim))
        agree(spec, SplitDecode.inputs(spec, Load(2, 2, 70, "float32")))


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 1), (7, 1), (16, 2), (12, 4)])
@pytest.mark.parametrize("queries", [1, 3, 8])
def test_groups_and_new_tokens(heads: int, kv_heads: int, queries: int) -> None:
    spec, load = DecodeSpec(grouped(heads, kv_heads)), Load(1, queries, 70, "float32")
    agree(spec, SplitDecode.inputs(spec, load))


def test_more_rows_than_one_tile_holds() -> None:
    spec, load = DecodeSpec(grouped(71, 1)), Load(1, 2, 40, "float32")
    agree(spec, SplitDecode.inputs(spec, load))


@pytest.mark.parametrize("splits,queries", [*((n, 1) for n in range(1, 8)), (1, 4), (3, 4)])
def test_sequences_of_various_lengths_in_one_cache(splits: int, queries: int) -> None:
    spec, load = DecodeSpec(grouped(kv_heads=2)), Load(5, queries, 160, "float32")
    inputs = SplitDecode.inputs(spec, load)
    inputs["lengths"] = lengths(0, 4, 63, 100, 160)
    for b, length in enumerate(inputs["lengths"].tolist()):  # nothing behind a length is read
        inputs["k"][b, :, length:] = torch.nan
        inputs["v"][b, :, length:] = torch.nan
    got = agree(spec, inputs, SplitDecode(32, splits))
    assert bool((got[0] == 0).all())


def test_lengths_past_the_cache_and_fewer_tokens_than_queries() -> None:
    spec, load = DecodeSpec(grouped()), Load(2, 4, 50, "float32")
    inputs = SplitDecode.inputs(spec, load)
    inputs["lengths"] = lengths(1000, 2)
    got = TILES.run(spec, inputs)
    inputs["lengths"] = lengths(50, 2)
    assert_close(got, agree(spec, inputs))  # type: ignore[arg-type]
    assert bool((got[1, :, :2] == 0).all())  # type: ignore[call-overload]


MASKS = (
    FULL, CAUSAL, Mask("window", left=20), Mask("window", left=20, sink=3),
    Mask("window", left=5, sink=40), Mask("window", left=300, sink=4),
    Mask("window", left=20, sink=3, causal=False),
)  # fmt: skip


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_masks(mask: Mask, queries: int) -> None:
    spec = DecodeSpec(grouped(mask=mask))
    inputs = SplitDecode.inputs(spec, Load(3, queries, 150, "float32"))
    inputs["lengths"] = lengths(150, 47, 9)
    agree(spec, inputs, SplitDecode(16, 3))


def test_a_window_reads_no_more_than_it_needs() -> None:
    spec = DecodeSpec(grouped(mask=Mask("window", left=20, sink=3)))
    inputs = SplitDecode.inputs(spec, Load(1, 1, 150, "float32"))
    want = agree(spec, inputs)
    inputs["v"][:, :, 3:130] = torch.nan
    assert_close(TILES.run(spec, inputs), want)  # type: ignore[arg-type]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("sink", [0, 4])
def test_a_ring_holds_what_a_window_reads(sink: int, queries: int) -> None:
    left, batch = 24, 3
    slots = sink + left + queries - 1
    mask = Mask("window", left=left, sink=sink)
    spec, load = DecodeSpec(grouped(mask=mask), "ring"), Load(batch, queries, 200, "float32")
    inputs = SplitDecode.inputs(spec, load)
    assert inputs["k"].shape[2] == slots
    inputs["lengths"] = lengths(200, slots, 9)
    agree(spec, inputs, SplitDecode(32, 2))
    whole = DecodeSpec(grouped(mask=mask))
    linear = SplitDecode.inputs(whole, load)
    linear["lengths"] = inputs["lengths"]
    for b, length in enumerate(inputs["lengths"].tolist()):
        for p in range(length):
            slot = p if p < sink else sink + (p - sink) % (slots - sink)
            inputs["k"][b, :, slot] = linear["k"][b, :, p]
            inputs["v"][b, :, slot] = linear["v"][b, :, p]
    inputs["q"] = linear["q"]
    assert_close(TILES.run(spec, inputs), agree(whole, linear))  # type: ignore[arg-type]


@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("mask", [CAUSAL, Mask("window", left=20, sink=3)], ids=str)
def test_pages(page: int, mask: Mask) -> None:
    spec, load = DecodeSpec(grouped(mask=mask), "paged", page), Load(3, 2, 130, "float32")
    inputs = SplitDecode.inputs(spec, load)
    inputs["lengths"] = lengths(130, 0, 65)
    inputs["table"][2, -(-65 // page) :] = 1 << 30  # entries behind a length are not followed
    inputs["table"][1] = 1 << 30
    got = SplitDecode(16, 3).run(spec, inputs)
    inputs["table"][inputs["table"] == 1 << 30] = 0
    assert_close(got, agree(spec, inputs))  # type: ignore[arg-type]


@pytest.mark.parametrize("cache,page", [("contiguous", 0), ("paged", 16)])
@pytest.mark.parametrize("run", [1, 16])
def test_selected_runs(cache: Any, page: int, run: int) -> None:
    spec = DecodeSpec(grouped(kv_heads=2), cache, page, selected=5, run=run)
    for queries in (1, 2):
        inputs = SplitDecode.inputs(spec, Load(2, queries, 160, "float32"))
        inputs["lengths"] = lengths(160, 90)
        agree(spec, inputs)
        inputs["counts"] = torch.tensor([[5, 0], [1, 3]], dtype=torch.int32)
        inputs["selected"][1, 1, 1] = -1000  # an entry that names nothing
        inputs["bias"] = torch.randn(1, 4, queries, 160)
        agree(spec, inputs)


def test_every_page_selected_is_attention_over_all() -> None:
    spec = DecodeSpec(grouped(), selected=10, run=16)
    inputs = SplitDecode.inputs(spec, Load(2, 1, 160, "float32"))
    got = agree(spec, inputs)
    every = {key: x for key, x in inputs.items() if key != "selected"}
    assert_close(got, agree(DecodeSpec(grouped()), every))


def test_sequences_padded_on_the_left() -> None:
    for mask in (CAUSAL, Mask("window", left=20, sink=3)):
        for cache, page in (("contiguous", 0), ("paged", 16)):
            spec = DecodeSpec(grouped(mask=mask), cache, page, starts=True)  # type: ignore[arg-type]
            inputs = SplitDecode.inputs(spec, Load(3, 2, 96, "float32"))
            inputs["starts"] = lengths(0, 37, 94)
            if cache == "contiguous":
                inputs["k"][1, :, :37] = torch.nan
            agree(spec, inputs)


@pytest.mark.parametrize("cache,page", [("contiguous", 0), ("paged", 16)])
@pytest.mark.parametrize(
    "extras", [("bias",), ("keep",), ("padding",), ("sinks",), ("bias", "keep", "sinks")]
)
def test_extras(cache: Any, page: int, extras: tuple[str, ...]) -> None:
    spec = DecodeSpec(grouped(extras=extras), cache, page)
    inputs = SplitDecode.inputs(spec, Load(2, 3, 96, "float32"))
    inputs["lengths"] = lengths(96, 50)
    agree(spec, inputs, SplitDecode(32, 3))


def test_extras_of_a_ring() -> None:
    mask = Mask("window", left=24, sink=4)
    spec = DecodeSpec(grouped(mask=mask, extras=("padding", "sinks")), "ring", slopes=True)
    inputs = SplitDecode.inputs(spec, Load(2, 2, 90, "float32"))
    inputs["padding"] = inputs["padding"][:, : inputs["k"].shape[2]]
    agree(spec, inputs)


def test_a_query_whose_keys_are_all_dropped_gives_zeros() -> None:
    spec = DecodeSpec(grouped(extras=("keep",)))
    inputs = SplitDecode.inputs(spec, Load(2, 1, 96, "float32"))
    inputs["keep"][0] = False
    got = agree(spec, inputs)
    assert bool((got[0] == 0).all()) and not bool((got[1] == 0).any())


def test_soft_cap_and_linear_biases() -> None:
    spec = DecodeSpec(grouped(softcap=3.0), slopes=True)
    inputs = SplitDecode.inputs(spec, Load(2, 3, 70, "float32"))
    agree(spec, inputs)
    inputs["slopes"] = torch.rand(2, 4)
    agree(spec, inputs)


@triton.jit
def near(b, h, i, j, data):  # type: ignore[no-untyped-def]
    return (i - j < data[0]) | (j % 3 == 0)


@triton.jit
def tilted(logits, b, h, i, j, data):  # type: ignore[no-untyped-def]
    return logits + (j % 7).to(tl.float32) * 0.1 * (h + b).to(tl.float32)


def test_hooks() -> None:
    spec = DecodeSpec(grouped())
    inputs = SplitDecode.inputs(spec, Load(2, 3, 70, "float32"))
    got = split_decode(
        **inputs, scale=0.2, keep_hook=near, score_hook=tilted, data=(9,), splits=2, block_n=16
    )
    want, _ = plain.split_decode(
        **wide(inputs), scale=0.2,
        keep_hook=lambda b, h, i, j: (i - j < 9) | (j % 3 == 0),
        score_hook=lambda x, b, h, i, j: x + (j % 7) * 0.1 * (h + b),
    )  # fmt: skip
    assert_close(got, want)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(
    "cache,page,selected",
    [("ring", 0, 0), ("paged", 16, 0), ("contiguous", 0, 3), ("paged", 16, 3)],
)
def test_hooks_are_given_positions_in_every_cache(
    cache: Any, page: int, selected: int, queries: int
) -> None:
    mask = Mask("window", left=24, sink=4) if cache == "ring" else CAUSAL
    spec = DecodeSpec(grouped(kv_heads=2, mask=mask), cache, page, selected, 16)
    inputs = SplitDecode.inputs(spec, Load(2, queries, 96, "float32"))
    inputs["lengths"] = lengths(96, 75)
    options = SplitDecode(16, 2).constants(spec)
    got = split_decode(
        **inputs, **options, keep_hook=near, score_hook=tilted, data=(9,), with_lse=True
    )
    meaning = {key: options[key] for key in (*mask_arguments(mask), "scale", "ring", "run")}
    want = plain.split_decode(
        **wide(inputs), **meaning,
        keep_hook=lambda b, h, i, j: (i - j < 9) | (j % 3 == 0),
        score_hook=lambda x, b, h, i, j: x + (j % 7) * 0.1 * (h + b),
    )  # fmt: skip
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("splits", [1, 3])
def test_half_precisions(dtype: str, splits: int) -> None:
    spec = DecodeSpec(grouped(8, 1, 64))
    inputs = SplitDecode.inputs(spec, Load(2, 1, 100, dtype))
    got = agree(spec, inputs, SplitDecode(32, splits))
    assert got.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("held", ["float8_e5m2", "float8_e4m3fn"])
def test_caches_in_fewer_bits(held: str) -> None:
    spec = DecodeSpec(grouped(8, 1, 64), cache_dtype=held)
    inputs = SplitDecode.inputs(spec, Load(2, 1, 100, "float32"))
    got = split_decode(**inputs, scale=0.125, k_scale=0.5, v_scale=2.0, splits=2)
    want, _ = plain.split_decode(**wide(inputs), scale=0.125, k_scale=0.5, v_scale=2.0)
    assert_close(got, want)


@pytest.mark.parametrize("splits", [1, 4])
def test_log_sum_exps_and_rows_without_keys(splits: int) -> None:
    spec = DecodeSpec(grouped(extras=("sinks",)))
    inputs = SplitDecode.inputs(spec, Load(3, 2, 70, "float32"))
    inputs["lengths"] = lengths(70, 1, 0)
    for named in (inputs, {key: x for key, x in inputs.items() if key != "sinks"}):
        got = split_decode(**named, scale=0.2, with_lse=True, splits=splits, block_n=16)
        want = plain.split_decode(**wide(named), scale=0.2)
        assert_close(got[0], want[0])
        assert_close(got[1].nan_to_num(neginf=-9.0), want[1].nan_to_num(neginf=-9.0))


def test_strided_tensors() -> None:
    spec = DecodeSpec(grouped())
    inputs = SplitDecode.inputs(spec, Load(2, 1, 70, "float32"))
    want = agree(spec, inputs)
    inputs["k"] = inputs["k"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["v"] = inputs["v"].transpose(2, 3).contiguous().transpose(2, 3)
    inputs["q"] = torch.stack([inputs["q"], inputs["q"]], 1)[:, 0]
    del inputs["lengths"]  # all slots then
    assert_close(TILES.run(spec, inputs), want)  # type: ignore[arg-type]


def test_the_number_of_splits_fills_the_device() -> None:
    assert split_count(64, 264, 512) == 4  # 256 of 264 places
    assert split_count(1, 264, 10_000) == 264
    assert split_count(264, 264, 512) == 1
    assert split_count(1, 264, 20) == 20
    assert split_count(1, 264, 3) == 1  # merging takes longer than two more tiles
    assert split_count(300, 264, 512) > 1  # a second wave of 36 programs would waste the rest
    for programs in (1, 7, 100, 265, 5000):
        for tiles in (1, 5, 300):
            assert 1 <= split_count(programs, 264, tiles) <= tiles


def test_the_default_splits_by_the_units_of_the_target() -> None:
    spec, load = DecodeSpec(grouped(8, 1, 64)), Load(1, 1, 257, "float32")
    for name in ("h100", "mi300x", "l4"):
        kernel = SplitDecode.default(spec, target(name), load)
        assert kernel.units == target(name).units
        agree(spec, SplitDecode.inputs(spec, load), kernel)


def test_what_is_not_computed_says_why() -> None:
    h100 = target("h100")
    assert SplitDecode.supports(DecodeSpec(grouped()), h100) is None
    for spec, why in (
        (DecodeSpec(grouped(dim=320)), "more than 256"),
        (DecodeSpec(grouped(scale=-1.0)), "not positive"),
        (DecodeSpec(grouped(extras=("keep",), fill="min")), "mean of all values"),
        (DecodeSpec(grouped(extras=("bias",)), "ring"), "no columns"),
    ):
        miss = SplitDecode.supports(spec, h100)
        assert miss is not None and why in miss.reason
    few_bits = DecodeSpec(grouped(), cache_dtype="float8_e4m3fn")
    assert SplitDecode.supports(few_bits, h100) is None
    miss = SplitDecode.supports(few_bits, target("a100"))
    assert miss is not None and "has no float8_e4m3fn" in miss.reason


def test_specs_are_one_line_and_refuse_what_makes_no_sense() -> None:
    spec = DecodeSpec(grouped(mask=Mask("window", left=9)), "paged", 16, selected=4, run=16)
    assert "\n" not in spec.text and spec.text.startswith("decode{attention=attn(heads=4,")
    assert spec.text.endswith("cache=paged page=16 selected=4 run=16}")
    for wrong in (
        {"cache": "heap"}, {"cache": "paged"}, {"page": 16}, {"selected": -1},
        {"cache": "ring", "starts": True},
    ):  # fmt: skip
        with pytest.raises(Problem) as refused:
            replace(DecodeSpec(grouped()), **wrong)  # type: ignore[arg-type]
        assert refused.value.code == "A820"


def test_work_counts_what_is_read() -> None:
    load = Load(2, 1, 1000)
    dense = SplitDecode.work(DecodeSpec(grouped()), load)
    assert dense.bytes == (2 * 1 * 1000 * 64 + 2 * 4 * 64) * 2
    assert dense.flops == 2.0 * 2 * 4 * 1000 * 64
    few = SplitDecode.work(DecodeSpec(grouped(), selected=10, run=16), load)
    assert few.bytes == (2 * 1 * 160 * 64 + 2 * 4 * 64) * 2


def test_a_ring_with_room_to_spare_still_cuts_the_window() -> None:
    spec = DecodeSpec(grouped(mask=Mask("window", left=16, sink=4)), "ring")
    inputs = SplitDecode.inputs(spec, Load(1, 1, 300, "float32"))
    roomy = {key: torch.randn(*inputs[key].shape[:2], 29, 32) for key in ("k", "v")}
    agree(spec, {**inputs, **roomy}, SplitDecode(16))


def test_sinks_that_take_nothing() -> None:
    spec = DecodeSpec(grouped().with_(extras=("sinks",)))
    inputs = SplitDecode.inputs(spec, Load(1, 1, 40, "float32"))
    agree(spec, {**inputs, "sinks": torch.full((1, 4, 1, 1), float("-inf"))}, SplitDecode(16))


def test_lengths_may_share_one_number_and_a_batch_may_be_empty() -> None:
    spec = DecodeSpec(grouped())
    inputs = SplitDecode.inputs(spec, Load(3, 1, 70, "float32"))
    agree(spec, {**inputs, "lengths": torch.tensor([40], dtype=torch.int32).expand(3)})
    none = {key: x[:0] for key, x in inputs.items()}
    assert SplitDecode().run(spec, none).shape == (0, 4, 1, 32)
