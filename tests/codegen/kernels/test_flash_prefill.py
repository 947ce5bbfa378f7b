"""Attention of many queries, against its reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.arguments import mask_arguments
from attnopt.codegen.kernel import Inputs, Load, kernels, read_kernel
from attnopt.codegen.kernels.flash_prefill import FlashPrefill, flash_prefill
from attnopt.codegen.kernels.references import flash_prefill as plain
from attnopt.codegen.pieces.alibi import alibi
from attnopt.codegen.pieces.sizes import with_strides
from attnopt.codegen.target import known, target
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask
from tests.tolerance import assert_close

TILES = FlashPrefill(32, 16)
WINDOWS = (
    Mask("window", left=1),
    Mask("window", left=40),
    Mask("window", left=40, sink=3),
    Mask("window", left=5, sink=40),
    Mask("window", left=500, sink=3),
    Mask("window", left=40, causal=False),
    Mask("window", left=20, sink=3, causal=False),
    Mask("window", left=5, sink=90, causal=False),
)


def spec_of(mask: Mask = CAUSAL, dim: int = 32, group: int = 2, **changes: Any) -> AttentionSpec:
    """A small attention: two key/value heads, each read by `group` query heads."""
    return AttentionSpec(2 * group, 2, dim, dim, dim**-0.5, mask).with_(**changes)


def agree(spec: AttentionSpec, load: Load, kernel: FlashPrefill = TILES, **changes: Any) -> Tensor:
    """Hold the kernel's output and log-sum-exps against the reference; `changes` are inputs."""
    inputs = {**FlashPrefill.inputs(spec, load), **changes}
    got, lse = flash_prefill(**inputs, **kernel.constants(spec), with_lse=True)
    want, ends = reference(spec, inputs)
    assert_close(got, want, f"{spec.text} {kernel.text}")
    assert_close(lse, ends, f"log-sum-exps of {spec.text} {kernel.text}")
    return got


def reference(spec: AttentionSpec, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exps in float64."""
    return plain.flash_prefill(
        **{key: wide(value) for key, value in inputs.items()}, **mask_arguments(spec.mask),
        scale=spec.scale, softcap=spec.softcap, mean_of_none=spec.fill == "min",
    )  # fmt: skip


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("length", [1, 63, 100, 128, 257])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, *WINDOWS], ids=str)
def test_every_mask_at_every_length(mask: Mask, length: int) -> None:
    agree(spec_of(mask, group=1), Load(1, length, length, "float32"), FlashPrefill(64, 64))


@pytest.mark.parametrize("dim", [32, 33, 40, 57, 64, 80, 96, 128, 192, 256])
def test_every_head_dim(dim: int) -> None:
    agree(spec_of(dim=dim, group=1), Load(1, 63, 63, "float32"), FlashPrefill(64, 32))


@pytest.mark.parametrize(("dim", "v_dim"), [(40, 64), (64, 24), (192, 128)])
def test_values_may_have_another_width(dim: int, v_dim: int) -> None:
    agree(spec_of(FULL, dim, v_dim=v_dim), Load(1, 40, 33, "float32"))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mask", [CAUSAL, WINDOWS[2], WINDOWS[7]], ids=str)
def test_grouped_heads(mask: Mask, packed: bool, group: int) -> None:
    spec, load = spec_of(mask, group=group), Load(1, 37, 37, "float32")
    agree(spec, load, FlashPrefill(64 if packed else 32, 16, packed))


@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize("block_n", [16, 64, 128])
def test_tiles(block_m: int, block_n: int) -> None:
    for mask in (CAUSAL, WINDOWS[2]):
        agree(spec_of(mask), Load(1, 63, 63, "float32"), FlashPrefill(block_m, block_n, True))


@pytest.mark.parametrize(("queries", "keys"), [(1, 100), (100, 1), (37, 128), (128, 37)])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, *WINDOWS[2:]], ids=str)
def test_as_many_keys_as_one_likes(mask: Mask, queries: int, keys: int) -> None:
    for fill in ("-inf", "min"):
        agree(spec_of(mask, group=1, fill=fill), Load(1, queries, keys, "float32"))


@pytest.mark.parametrize("mask", [CAUSAL, *WINDOWS], ids=str)
def test_chunks_against_a_cache_give_what_the_whole_gives(mask: Mask) -> None:
    spec = spec_of(mask, group=1)
    inputs = FlashPrefill.inputs(spec, Load(1, 100, 100, "float32"))
    whole = TILES.run(spec, inputs)
    assert isinstance(whole, Tensor)
    for start, end in ((0, 41), (41, 42), (42, 100)):
        chunk = {**inputs, "q": inputs["q"][:, :, start:end], "offset": start}
        seen = end if mask.causal else 100
        chunk |= {name: inputs[name][:, :, :seen] for name in ("k", "v")}
        part = TILES.run(spec, chunk)
        assert isinstance(part, Tensor)
        assert_close(part, whole[:, :, start:end])


@pytest.mark.parametrize("offset", [-150, -7, 300])
def test_queries_may_stand_before_and_behind_all_keys(offset: int) -> None:
    for mask in (CAUSAL, WINDOWS[2], WINDOWS[4], WINDOWS[7]):
        agree(spec_of(mask), Load(1, 40, 50, "float32"), offset=offset)


@pytest.mark.parametrize("mask", [CAUSAL, WINDOWS[2], WINDOWS[6]], ids=str)
def test_tiles_begin_and_end_anywhere(mask: Mask) -> None:
    for offset in range(18, 50):
        agree(
            spec_of(mask, group=1), Load(1, 2, 50, "float32"), FlashPrefill(16, 16), offset=offset
        )


EXTRAS = [("bias",), ("keep",), ("padding",), ("sinks",), ("bias", "keep", "padding", "sinks")]


@pytest.mark.parametrize("extras", EXTRAS, ids="+".join)
@pytest.mark.parametrize("packed", [False, True])
def test_extras(extras: tuple[str, ...], packed: bool) -> None:
    for mask, fill in ((FULL, "-inf"), (CAUSAL, "min"), (WINDOWS[2], "-inf"), (WINDOWS[6], "min")):
        spec = spec_of(mask, extras=extras, fill=fill)
        agree(spec, Load(2, 40, 40, "float32"), FlashPrefill(64 if packed else 32, 32, packed))


@pytest.mark.parametrize("shape", [(33,), (45, 1), (1, 4, 1, 33), (2, 1, 45, 33), (1, 1, 1, 1)])
def test_extras_are_broadcast(shape: tuple[int, ...]) -> None:
    given = {"bias": torch.randn(shape), "keep": torch.rand(shape) < 0.7}
    agree(spec_of(FULL, extras=("bias", "keep")), Load(2, 45, 33, "float32"), **given)


def test_extras_in_any_layout() -> None:
    bias = torch.randn(33, 45, 4, 2).permute(3, 2, 1, 0)
    padding = (torch.rand(33, 2) < 0.7).t()
    agree(spec_of(FULL), Load(2, 45, 33, "float32"), bias=bias, padding=padding)


@pytest.mark.parametrize("shape", [(1,), (4, 1, 1), (2, 4, 1, 1), (1, 1, 45, 1)])
def test_sinks_are_broadcast(shape: tuple[int, ...]) -> None:
    agree(spec_of(), Load(2, 45, 45, "float32"), sinks=torch.randn(shape))


def test_a_sink_of_minus_infinity_is_none() -> None:
    keep = torch.ones(45, 45, dtype=torch.bool)
    keep[7] = False
    sinks = torch.tensor([0.5, float("-inf"), 2.0, float("-inf")])[:, None, None]
    got = agree(spec_of(), Load(1, 45, 45, "float32"), sinks=sinks, keep=keep)
    assert not got[:, :, 7].any()


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_without_keys_gives_zeros_or_the_mean_of_all_values(packed: bool) -> None:
    keep = torch.rand(2, 1, 45, 45) < 0.8
    keep[0, 0, 3] = keep[1, 0, 40:] = False
    for mask in (CAUSAL, WINDOWS[2]):
        kernel, load = FlashPrefill(32, 16, packed), Load(2, 45, 45, "float32")
        got = agree(spec_of(mask), load, kernel, keep=keep)
        assert not got[0, :, 3].any() and not got[1, :, 40:].any()
        got = agree(spec_of(mask, fill="min"), load, kernel, keep=keep)
        assert_close(got[1, :, 40], got[1, :, 44])
        assert got[1, :, 40].abs().min() > 0


@pytest.mark.parametrize("packed", [False, True])
def test_a_soft_cap(packed: bool) -> None:
    q = 30 * torch.randn(2, 4, 45, 32)
    for extras in ((), ("bias", "keep")):
        spec = spec_of(softcap=5.0, extras=extras)
        agree(spec, Load(2, 45, 45, "float32"), FlashPrefill(32, 16, packed), q=q)


def test_logits_beyond_what_exp_takes() -> None:
    whole = {
        "q": torch.randint(-300, 300, (1, 4, 45, 32)),
        "k": torch.randint(-3, 3, (1, 2, 45, 32)),
    }
    exact = {key: x.float() for key, x in whole.items()}  # so are products and their sums
    agree(spec_of(scale=0.25), Load(1, 45, 45, "float32"), **exact)


def test_a_bias_of_the_lowest_number_drops_a_key() -> None:
    bias = torch.where(torch.rand(45, 45) < 0.3, torch.finfo(torch.float32).min, 0.0)
    bias.fill_diagonal_(0.0)
    agree(spec_of(), Load(1, 45, 45, "float32"), bias=bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mask", [CAUSAL, WINDOWS[2]], ids=str)
def test_half_precision(mask: Mask, dtype: str) -> None:
    spec = spec_of(mask, 64, extras=("bias", "sinks"))
    got = agree(spec, Load(1, 100, 100, dtype), FlashPrefill(64, 32))
    assert got.dtype == getattr(torch, dtype)


def test_any_layout() -> None:
    spec = spec_of(FULL, 32)
    q, k = torch.randn(2, 45, 4, 32).transpose(1, 2), torch.randn(2, 2, 32, 40).transpose(2, 3)
    v = torch.randn(1, 2, 40, 64)[..., ::2].expand(2, 2, 40, 32)
    agree(spec, Load(2, 45, 40, "float32"), q=q, k=k, v=v)


def test_addresses_pass_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    step, spec = 2**26, spec_of()
    memory = torch.empty(70 * step, dtype=torch.float16)  # of which only a few pages are touched
    inputs = FlashPrefill.inputs(spec, Load(1, 33, 33, "float16"))
    far = {}
    for place, name in enumerate(("q", "k", "v")):
        heads = inputs[name].shape[1]
        far[name] = memory[200 * place :].as_strided((1, heads, 33, 32), (1, 40, step, 1))
        far[name].copy_(inputs[name])
    assert_close(TILES.run(spec, far), reference(spec, inputs)[0])  # type: ignore[arg-type]


@triton.jit
def near_or_even(b, h, i, j, data):
    return (i - j < data[0] + h) | (j % 2 == b)


@triton.jit
def same_document(b, h, i, j, data):
    last = data[1] - 1
    of_key = tl.load(data[0] + b * data[1] + tl.minimum(j, last))
    return tl.load(data[0] + b * data[1] + tl.minimum(i, last)) == of_key


@pytest.mark.parametrize("packed", [False, True])
def test_a_hook_drops_keys(packed: bool) -> None:
    spec, kernel = spec_of(FULL), FlashPrefill(32, 16, packed)
    inputs = FlashPrefill.inputs(spec, Load(2, 45, 50, "float32"))
    got = flash_prefill(
        **inputs, **kernel.constants(spec), keep_hook=near_or_even, data=(3,), with_lse=True
    )
    hook = lambda b, h, i, j: (i - j < 3 + h) | (j % 2 == b)  # noqa: E731
    for found, want in zip(got, reference(spec, {**inputs, "keep_hook": hook}), strict=True):
        assert_close(found, want)


@pytest.mark.parametrize("mask", [CAUSAL, FULL], ids=str)
def test_a_hook_keeps_documents_apart(mask: Mask) -> None:
    spec = spec_of(mask, group=1)
    inputs = FlashPrefill.inputs(spec, Load(2, 100, 100, "float32"))
    documents = torch.randint(0, 2, (2, 100)).cumsum(1).to(torch.int32) // 20
    got = TILES.run(spec, {**inputs, "keep_hook": same_document, "data": (documents, 100)})
    assert isinstance(got, Tensor)
    keep = documents[:, None, :, None] == documents[:, None, None, :]
    assert_close(got, reference(spec, {**inputs, "keep": keep})[0])


@pytest.mark.parametrize("packed", [False, True])
def test_a_hook_adds_alibi(packed: bool) -> None:
    spec, kernel = spec_of(), FlashPrefill(32, 16, packed)
    inputs = FlashPrefill.inputs(spec, Load(2, 45, 45, "float32"))
    slopes = 2.0 ** -torch.arange(1.0, 5.0)
    got = kernel.run(spec, {**inputs, "score_hook": alibi, "data": with_strides(slopes, 2, 4)})
    assert isinstance(got, Tensor)
    i, j = torch.arange(45)[:, None], torch.arange(45)
    bias = -slopes[:, None, None] * (i - j)
    assert_close(got, reference(spec, {**inputs, "bias": bias})[0])


QUERIES, KEYS = (0, 1, 1, 38, 138, 138, 150), (0, 1, 64, 101, 101, 113, 300)


def various(spec: AttentionSpec, dtype: torch.dtype = torch.float32) -> Inputs:
    """Six sequences: of one token, one query, as many queries as keys, no keys, no queries, and
    fewer queries than keys."""
    load = Load(1, QUERIES[-1], KEYS[-1])
    given = {k: x.to(dtype) for k, x in FlashPrefill.inputs(spec, load).items()}
    starts = [torch.tensor(x, dtype=torch.int32) for x in (QUERIES, KEYS)]
    return {**given, "q_starts": starts[0], "k_starts": starts[1], "longest": 100}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fill", ["-inf", "min"])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOWS[2], WINDOWS[7]], ids=str)
def test_sequences_of_various_lengths(mask: Mask, fill: str, packed: bool) -> None:
    spec = spec_of(mask, fill=fill)
    agree(spec, Load(), FlashPrefill(64 if packed else 32, 32, packed), **various(spec))


@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOWS[2]], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_few_programs_turn_to_all_tiles(mask: Mask, packed: bool) -> None:
    spec = spec_of(mask, fill="min")
    few = FlashPrefill(32, 32, packed, waves=2, units=3)
    agree(spec, Load(2, 70, 100, "float32"), few)
    agree(spec, Load(), few, **various(spec))


def test_rows_beyond_the_last_sequence_have_no_key() -> None:
    spec = spec_of()
    inputs = various(spec)
    for name in ("q_starts", "k_starts"):
        inputs[name] = inputs[name][:-2]
    out, lse = flash_prefill(**inputs, **TILES.constants(spec), with_lse=True)
    end = QUERIES[-3]
    assert not out[:, :, end:].any() and bool(lse[:, :, end:].isneginf().all())
    assert bool(out[:, :, :1].any()) and bool(lse[:, :, :1].isfinite().all())


def test_more_queries_than_keys_by_far() -> None:
    """Rows that stand before the first key read nothing, neither do they read out of bounds."""
    for mask in (CAUSAL, WINDOWS[2], WINDOWS[6]):
        spec = spec_of(mask, group=1)
        starts = {"q_starts": torch.tensor([0, 200, 400]), "k_starts": torch.tensor([0, 3, 40])}
        starts = {key: x.to(torch.int32) for key, x in starts.items()}
        inputs = FlashPrefill.inputs(spec, Load(1, 400, 40, "float32"))
        agree(spec, Load(), TILES, **{**inputs, **starts, "longest": 200})


def test_one_sink_per_head_with_various_lengths() -> None:
    spec = spec_of(softcap=5.0)
    inputs, sinks = various(spec), torch.randn(1, 4, 1, 1)
    got = TILES.run(spec, {**inputs, "sinks": sinks})
    assert isinstance(got, Tensor)
    for a, b, c, d in zip(QUERIES, QUERIES[1:], KEYS, KEYS[1:], strict=False):
        if b > a:
            part = {"q": inputs["q"][:, :, a:b], "offset": d - c - (b - a), "sinks": sinks}
            part |= {name: inputs[name][:, :, c:d] for name in ("k", "v")}
            assert_close(got[:, :, a:b], reference(spec, part)[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": torch.zeros(1)}, "bias, keep and padding have no meaning"),
        ({"keep": torch.ones(1, dtype=torch.bool)}, "have no meaning for sequences of various"),
        ({"padding": torch.ones(1, 300, dtype=torch.bool)}, "have no meaning"),
        ({"sinks": torch.zeros(1, 4, 150, 1)}, "sinks are one number per head"),
        ({"v": torch.zeros(1, 2, 299, 32)}, "do not match"),
        ({"k": torch.zeros(1, 2, 300, 40)}, "do not match"),
        ({"q": torch.zeros(1, 5, 150, 32)}, "5 query heads cannot share 2"),
    ],
)
def test_what_has_no_meaning_is_refused(changes: Inputs, words: str) -> None:
    spec = spec_of()
    with pytest.raises(ValueError, match=words):
        TILES.run(spec, {**various(spec), **changes})


def test_no_queries_and_no_keys() -> None:
    spec = spec_of()
    inputs = FlashPrefill.inputs(spec, Load(2, 0, 5, "float32"))
    assert TILES.run(spec, inputs).shape == (2, 4, 0, 32)  # type: ignore[union-attr]
    inputs = FlashPrefill.inputs(spec, Load(2, 5, 0, "float32"))
    assert not TILES.run(spec, inputs).any()  # type: ignore[union-attr]


def test_it_is_a_kernel_that_is_known_by_name() -> None:
    assert kernels()["flash_prefill"] is FlashPrefill
    assert read_kernel("flash_prefill{block_m=64 packed=true}") == FlashPrefill(64, packed=True)


def test_what_it_does_not_support() -> None:
    h100 = target("h100")
    assert FlashPrefill.supports(spec_of(), h100) is None
    reasons = {
        "head_dim 320 is more than 256": spec_of(dim=320),
        "the softmax scale -1.0 is not positive": spec_of(scale=-1.0),
        "an extra is given twice: bias, bias": spec_of(extras=("bias", "bias")),
    }
    for reason, spec in reasons.items():
        miss = FlashPrefill.supports(spec, h100)
        assert miss is not None and miss.reason == reason
    miss = FlashPrefill.supports(spec_of(), target("cpu"))
    assert miss is not None and "CPU" in miss.reason


@pytest.mark.parametrize("name", [name for name in known() if name != "cpu"])
def test_default_tiles(name: str) -> None:
    space, device = FlashPrefill.space(), target(name)
    for spec, load in FlashPrefill.examples():
        assert FlashPrefill.supports(spec, device) is None
        for dtype in ("float16", "float32"):
            for queries in (1, 7, 100, 8192):
                sized = Load(load.batch, queries, load.keys, dtype)
                made = FlashPrefill.default(spec, device, sized)
                assert all(getattr(made, key) in values for key, values in space.items())
                assert made.packed == (queries in (1, 7))
    short = FlashPrefill.default(spec_of(dim=64), device, Load(1, 20, 100, "float32"))
    agree(spec_of(dim=64), Load(1, 20, 100, "float32"), short, offset=80)


def test_work_counts_what_is_read() -> None:
    load = Load(1, 1024, 1024)
    full, causal = (FlashPrefill.work(spec_of(mask, 64), load) for mask in (FULL, CAUSAL))
    assert full.flops == 4 * 1024 * 1024 * 64 * 4
    assert causal.flops == pytest.approx(full.flops * 1025 / 2048)
    assert full.bytes == causal.bytes == 2 * 1024 * 64 * (4 + 4 + 2 + 2)


def test_a_row_of_the_lowest_bias_weighs_its_keys_alike() -> None:
    spec = spec_of(extras=("bias",))
    inputs = FlashPrefill.inputs(spec, Load(1, 45, 45, "float32"))
    inputs["bias"][..., 3, :] = torch.finfo(torch.float32).min
    got = FlashPrefill(32, 16).run(spec, inputs)
    assert isinstance(got, Tensor) and got[0, :, 3].abs().min() > 0
    assert_close(got, reference(spec, inputs)[0])


def test_a_two_sided_window_reads_all_sinks() -> None:
    mask = Mask("window", left=4, sink=100, causal=False)
    agree(spec_of(mask), Load(1, 64, 128, "float32"), FlashPrefill(16, 16))
