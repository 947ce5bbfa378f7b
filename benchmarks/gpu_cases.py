"""The lines of the GPU table: sizes, peers and bars. Published figures that the bars come from are
kernel figures of the papers named; all comparisons here are with what runs beside on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt.codegen.block_sparse_spec import BlockSparseSpec, Dense, Scattered, Strided, Windowed
from attnopt.codegen.decode_spec import DecodeSpec
from attnopt.codegen.dispatch import Dispatch
from attnopt.codegen.kernel import Load, kernels
from attnopt.codegen.kernels.flash_prefill import FlashPrefill, flash_prefill
from attnopt.codegen.latent_spec import LatentSpec
from attnopt.codegen.shipped import chosen
from attnopt.codegen.target import Target
from attnopt.compiler.linear_spec import LinearSpec
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask
from benchmarks.gpu_case import OURS, Bar, Case, Contender, Given
from benchmarks.gpu_peers import (
    fla_linear,
    flash_mla,
    flashinfer_decode,
    flashinfer_latent,
    flex,
    sdpa,
    sdpa_backward,
)

CUDNN, FLASH, FLEX = "cuDNN", "FlashAttention-2", "FlexAttention"
SDPA, FLASHINFER, FLASH_MLA = "scaled_dot_product_attention", "FlashInfer", "FlashMLA"
FLA, DENSE = "flash-linear-attention", "attnopt, dense"
K = 1024
_OTHERS = {  # what no roofline tells, whatever the case
    CUDNN: "the share of the peak that it reaches is in no target's file",
    FLEX: "its code is generated, and no share of the peak is published for it",
    FLASHINFER: "it does the same work, and its share of the roofline is not published here",
    FLASH_MLA: "it does the same work, and its share of the roofline is not published here",
    FLA: "it does the same work, and its share of the roofline is not published here",
    "dispatch": "it leaves plain attention to torch, whose own choice among its kernels is to be "
    "measured, and what dispatch itself costs",
}


def cases() -> list[Case]:
    """All lines, those that the others build on first."""
    return [
        *(dense_prefill(length) for length in (8 * K, 16 * K)),
        dense_backward(8 * K), grouped_decode(), windowed_prefill(), strided_prefill(),
        *(scattered_prefill(density) for density in (0.05, 0.8)),
        *(mixed_prefill(kv_heads, full) for kv_heads, full in ((32, 8), (8, 4))),
        *(mixed_decode(kv_heads, full) for kv_heads, full in ((32, 8), (8, 4))),
        selected_decode(), *(latent_decode(heads) for heads in (16, 128)),
        *(linear(length) for length in (8 * K, 32 * K)),
    ]  # fmt: skip


def dense_prefill(length: int) -> Case:
    """Causal, 32 heads, two sequences."""
    spec = AttentionSpec(32, 32, 128, 128, 128**-0.5, CAUSAL)
    return Case(
        f"dense causal prefill, {length // K}k, B·H 64", "flash_prefill", spec,
        Load(2, length, length),
        (
            Bar(1.0, (CUDNN, FLASH, FLEX), contender="dispatch"), Bar(1.1, (FLASH,)),
            Bar(0.75, (CUDNN,)),
        ),
        {
            CUDNN: lambda: sdpa("CUDNN_ATTENTION"), FLASH: lambda: sdpa("FLASH_ATTENTION"),
            FLEX: lambda: flex(_causal, length, length),
        },
        same=(CUDNN, FLASH, FLEX, "dispatch"),
        composed={"dispatch": lambda target, load: _dispatched(spec, target)},
        like={FLASH: (("flash_prefill", spec),)}, unknown=_OTHERS,
    )  # fmt: skip


def dense_backward(length: int) -> Case:
    """The gradients of the same attention; nothing is asked of them, their times are told."""
    spec = AttentionSpec(32, 32, 128, 128, 128**-0.5, CAUSAL)
    return Case(
        f"dense causal backward, {length // K}k, B·H 64", "flash_prefill_backward", spec,
        Load(2, length, length),
        (Bar(1.0, (FLASH,), asked=False), Bar(1.0, (CUDNN,), asked=False)),
        {
            FLASH: lambda: sdpa_backward("FLASH_ATTENTION"),
            CUDNN: lambda: sdpa_backward("CUDNN_ATTENTION"),
        },
        same=(FLASH, CUDNN), prepare=_with_forward(spec),
        like={FLASH: (("flash_prefill_backward", spec),)}, unknown=_OTHERS,
    )  # fmt: skip


def grouped_decode() -> Case:
    """One token of eight sequences, eight query heads to a key/value head."""
    spec = DecodeSpec(AttentionSpec(64, 8, 128, 128, 128**-0.5, CAUSAL))
    paged = DecodeSpec(spec.attention, "paged", 64)
    return Case(
        "grouped decode 8:1, batch 8, 32k cache", "split_decode", spec, Load(8, 1, 32 * K),
        (
            Bar(0.8, of="bandwidth"), Bar(2.0, (SDPA,)),
            Bar(1.0, (FLASHINFER,), contender="attnopt, pages"),
        ),
        {
            SDPA: lambda: sdpa("FLASH_ATTENTION", causal=False),
            FLASHINFER: flashinfer_decode,
        },
        same=(SDPA,), alike=((FLASHINFER, "attnopt, pages"),),
        composed={"attnopt, pages": lambda target, load: _paged(paged, target, load)},
        prepare=_with_pages,
        like={
            SDPA: (("split_decode", spec),), "attnopt, pages": (("split_decode", paged),),
        },
        unknown=_OTHERS,
    )  # fmt: skip


def windowed_prefill() -> Case:
    """The last 1,024 keys and four sink tokens of 32k."""
    mask, length = Mask("window", left=K, sink=4), 32 * K
    dense = AttentionSpec(32, 32, 128, 128, 128**-0.5, CAUSAL)
    return Case(
        "window+sink 1k at 32k", "flash_prefill", dense.with_(mask=mask), Load(1, length, length),
        (Bar(8.0, (FLASH, CUDNN)), Bar(1.1, (FLEX,))),
        {
            FLASH: lambda: sdpa("FLASH_ATTENTION"), CUDNN: lambda: sdpa("CUDNN_ATTENTION"),
            FLEX: lambda: flex(lambda b, h, i, j: mask.keep(i, j), length, length),
        },
        same=(FLEX,), like={FLASH: (("flash_prefill", dense),)}, unknown=_OTHERS,
    )  # fmt: skip


def strided_prefill() -> Case:
    """S2-Attention's pattern (Lin et al. 2024) at 128k, sparse enough for its headline."""
    length = 128 * K
    spec = BlockSparseSpec(32, 32, 128, 128, 128**-0.5, Strided(16, 64))
    load = Load(1, length, length)
    density = _density(spec, load)
    dense = AttentionSpec(32, 32, 128, 128, 128**-0.5, CAUSAL)
    return Case(
        f"strided blocks, {density:.1%} of 128k", "block_sparse_prefill", spec, load,
        (Bar(0.8 / density, (DENSE,)), Bar(25.0, (FLASH,))),
        {FLASH: lambda: sdpa("FLASH_ATTENTION")}, own={DENSE: ("flash_prefill", dense)},
        like={FLASH: (("flash_prefill", dense),)},
    )  # fmt: skip


def scattered_prefill(density: float) -> Case:
    """Blocks drawn at random, as selection by content gives them (SLA, Zhang et al. 2025)."""
    spec = BlockSparseSpec(
        12, 12, 128, 128, 128**-0.5, Scattered(density, 4), causal=False, query_block=64
    )
    dense = AttentionSpec(12, 12, 128, 128, 128**-0.5, FULL)
    headline, even = Bar(13.7, (FLASH,)), Bar(1.0, (FLASH, CUDNN, DENSE))
    return Case(
        f"{1 - density:.0%} block-sparse, 32k, not causal", "block_sparse_prefill", spec,
        Load(1, 32 * K, 32 * K), (headline if density < 0.1 else even,),
        {
            FLASH: lambda: sdpa("FLASH_ATTENTION", causal=False),
            CUDNN: lambda: sdpa("CUDNN_ATTENTION", causal=False),
        },
        own={DENSE: ("flash_prefill", dense)}, like={FLASH: (("flash_prefill", dense),)},
        unknown=_OTHERS,
    )  # fmt: skip


def mixed_prefill(kv_heads: int, full: int) -> Case:
    """DuoAttention's shapes (Xiao et al. 2024): some heads whole, the others window and sink."""
    spec = BlockSparseSpec(32, kv_heads, 128, 128, 128**-0.5, Windowed(256, 64, full=full))
    dense = AttentionSpec(32, kv_heads, 128, 128, 128**-0.5, CAUSAL)
    return Case(
        f"mixed heads, prefill 100k, {full} of {kv_heads} whole", "block_sparse_prefill", spec,
        Load(1, 100 * K, 100 * K), (Bar(1.73 if kv_heads == 32 else 1.63, (FLASH,)),),
        {FLASH: lambda: sdpa("FLASH_ATTENTION")}, like={FLASH: (("flash_prefill", dense),)},
    )  # fmt: skip


def mixed_decode(kv_heads: int, full: int) -> Case:
    """The same, one token: whole heads over the cache, the others over a ring of 320 tokens."""
    spec = DecodeSpec(AttentionSpec(32, kv_heads, 128, 128, 128**-0.5, CAUSAL))
    return Case(
        f"mixed heads, decode 100k, {full} of {kv_heads} whole", "split_decode", spec,
        Load(1, 1, 100 * K),
        (Bar(2.18 if kv_heads == 32 else 1.5, (OURS, FLASH), contender="mixed"),),
        {FLASH: lambda: sdpa("FLASH_ATTENTION", causal=False)},
        composed={"mixed": lambda target, load: _mixed(spec, full, target, load)},
        like={
            "mixed": tuple(("split_decode", part) for part in _whole_and_streaming(spec, full)),
            FLASH: (("split_decode", spec),),
        },
    )  # fmt: skip


def selected_decode() -> Case:
    """2,048 of 32k tokens in pages of 64, against reading them all."""
    attention = AttentionSpec(64, 8, 128, 128, 128**-0.5, CAUSAL)
    whole = DecodeSpec(attention)
    return Case(
        "selected pages, 2k of 32k", "split_decode", DecodeSpec(attention, selected=32, run=64),
        Load(8, 1, 32 * K), (Bar(5.0, ("attnopt, all", FLASH)),),
        {FLASH: lambda: sdpa("FLASH_ATTENTION", causal=False)},
        composed={"attnopt, all": lambda target, load: _whole(whole, target, load)},
        like=dict.fromkeys(("attnopt, all", FLASH), (("split_decode", whole),)),
    )  # fmt: skip


def latent_decode(heads: int) -> Case:
    """Absorbed MLA at DeepSeek's sizes, against decoding with as many uncompressed heads."""
    bar = Bar(0.75, of="bandwidth") if heads == 16 else Bar(400e12, of="flops")
    plain = DecodeSpec(AttentionSpec(heads, heads, 192, 128, 192**-0.5, CAUSAL))
    batch, scale = 8 if heads == 16 else 4, 192**-0.5
    others = (FLASHINFER, FLASH_MLA)
    return Case(
        f"latent decode 512+64, {heads} heads, 32k", "latent_decode",
        LatentSpec(heads, 512, 64, 128, 128, scale), Load(batch, 1, 32 * K),
        (bar, Bar(4.0, ("uncompressed",)), Bar(1.0, others, asked=False)),
        {FLASHINFER: lambda: flashinfer_latent(scale), FLASH_MLA: lambda: flash_mla(scale)},
        same=others,
        composed={"uncompressed": lambda target, load: _uncompressed(plain, target, load)},
        like={"uncompressed": (("split_decode", plain),)}, unknown=_OTHERS,
    )  # fmt: skip


def linear(length: int) -> Case:
    """Retention (a decay per head), the sizes of flash-linear-attention's own benchmark."""
    spec = LinearSpec(8, 8, 256, 256, scale=256**-0.5, decay="head")
    return Case(
        f"linear chunk, {length // K}k", "linear_chunk", spec, Load(4, length, length),
        (Bar(0.95, (FLA,)), Bar(0.45, of="bandwidth")),
        {FLA: lambda: fla_linear("chunk_retention")}, prepare=_tokens_first, unknown=_OTHERS,
    )  # fmt: skip


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _dispatched(spec: AttentionSpec, target: Target) -> Contender:
    run = Dispatch(spec, target)
    return lambda given: run(given["q"], given["k"], given["v"])


def _with_forward(spec: AttentionSpec) -> Callable[[Given, Load], Given]:
    """Results and log-sum-exps that belong to the inputs, as a forward pass keeps them: so that
    gradients can be compared."""

    def made(given: Given, load: Load) -> Given:
        tiles = FlashPrefill(64, 32).constants(spec)
        out, lse = flash_prefill(given["q"], given["k"], given["v"], **tiles, with_lse=True)
        return {**given, "out": out, "lse": lse}

    return made


def _tokens_first(given: Given, load: Load) -> Given:
    """Tensors that lie in memory as [batch, tokens, heads, dim], which the peer would copy to."""
    lying = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    return {**given, **lying}


def _launched(spec: Any, target: Target, load: Load) -> Contender:
    cls = kernels()["split_decode"]
    made = chosen(cls, spec, target, load)
    return lambda given: made.run(spec, given)


def _whole(spec: DecodeSpec, target: Target, load: Load) -> Contender:
    run = _launched(spec, target, load)
    return lambda given: run({key: given[key] for key in ("q", "k", "v", "lengths")})


def _paged(spec: DecodeSpec, target: Target, load: Load) -> Contender:
    run = _launched(spec, target, load)
    return lambda given: run({
        "q": given["q"], "k": given["pages"][:, 0], "v": given["pages"][:, 1],
        "table": given["table"], "lengths": given["lengths"],
    })  # fmt: skip


def _with_pages(given: Given, load: Load) -> Given:
    """The cache once more in pages of 64 tokens, keys and values beside each other."""
    batch, kv_heads, depth = load.batch, given["k"].shape[1], given["k"].shape[3]
    count = batch * load.keys // 64
    pages = torch.randn(
        count, 2, 64, kv_heads, depth, dtype=given["k"].dtype, device=given["k"].device
    )
    table = torch.randperm(count, device=pages.device).int().reshape(batch, -1)
    return {**given, "pages": pages, "table": table}


def _whole_and_streaming(spec: DecodeSpec, full: int) -> tuple[DecodeSpec, DecodeSpec]:
    """The specs of the heads that read everything, and of the others, which read a ring."""
    of, group = spec.attention, spec.attention.group
    rest = of.kv_heads - full
    near = of.with_(heads=rest * group, kv_heads=rest, mask=Mask("window", left=256, sink=64))
    return DecodeSpec(of.with_(heads=full * group, kv_heads=full)), DecodeSpec(near, "ring")


def _mixed(spec: DecodeSpec, full: int, target: Target, load: Load) -> Contender:
    """Two launches on parts of the same cache; a ring is the front of the streaming heads' part."""
    whole, streaming = _whole_and_streaming(spec, full)
    first, second = (_launched(part, target, load) for part in (whole, streaming))
    cut, slots = whole.attention.heads, 256 + 64

    def run(given: Given) -> Any:
        q, k, v, lengths = (given[key] for key in ("q", "k", "v", "lengths"))
        near = {"k": k[:, full:, :slots], "v": v[:, full:, :slots]}
        return (
            first({"q": q[:, :cut], "k": k[:, :full], "v": v[:, :full], "lengths": lengths}),
            second({"q": q[:, cut:], **near, "lengths": lengths}),
        )

    return run


def _uncompressed(spec: DecodeSpec, target: Target, load: Load) -> Contender:
    """Decoding with a cache of its own, which it keeps: one set, larger than any L2."""
    run = _launched(spec, target, load)
    made: dict[str, Given] = {}

    def step(given: Given) -> Any:
        device = str(next(x for x in given.values() if isinstance(x, Tensor)).device)
        if device not in made:
            made[device] = kernels()["split_decode"].inputs(spec, load, device)
        return run(made[device])

    return step


def _density(spec: BlockSparseSpec, load: Load) -> float:
    """The pattern's share of the work of all blocks."""
    cls = kernels()["block_sparse_prefill"]
    return cls.work(spec, load).flops / cls.work(replace(spec, pattern=Dense()), load).flops
