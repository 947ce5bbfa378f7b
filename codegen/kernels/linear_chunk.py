"""Causal linear attention over many tokens, in chunks (Hua et al. 2022; RetNet, Sun et al. 2023).

Where the time should go, on an H100 at four sequences of 8192 tokens, 8 heads and D = 256: q, k, v
and o are 0.54 GB, 0.16 ms at full bandwidth. The usual two passes write the state at the border of
every chunk of 64 tokens and read it back: 2.1 GB more in float32, or 1.1 GB rounded, and keys and
values once more, which is most of their time. Here one program keeps the state of one head and one
tile of values in float32 registers for as long as it can and walks through the chunks itself,
multiplying out the pairs within a chunk and writing its rows at once; no state goes to memory
between chunks. What that costs: tiles of values of one head each compute q k^T, from nothing at
D = 64 (one tile) over a quarter of the products at 128 to half of them at 256, 0.15 TFLOP in all
here, 0.15 ms at the peak; they run side by side and share queries and keys in L2.

That needs heads * batch * tiles of values to fill the device. Where they do not, the tokens are cut
into segments: one kernel sums up what each segment adds to the state (keys and values are read
once more), a scan turns the sums into the states that the segments start from, and the same walk
runs in every segment at once. States cross memory once per segment, in float32; segments of a few
chunks are the usual two-pass design, and are among what the tuner may choose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
import triton
from torch import Tensor

from attnopt.codegen.kernel import CompilerOptions, Inputs, Kernel, Load, Outputs, Work
from attnopt.codegen.kernels.references import linear_chunk as plain
from attnopt.codegen.matrix_units import below_ampere, matrix_units
from attnopt.codegen.pieces.decays import decay_hook
from attnopt.codegen.pieces.feature_maps import feature_map
from attnopt.codegen.pieces.recurrence import chunked_recurrence
from attnopt.codegen.pieces.sizes import padded_size
from attnopt.codegen.shared_memory import stages_that_fit
from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss, choice
from attnopt.compiler.linear_spec import LinearSpec


def linear_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    initial: Tensor | None = None,
    initial_sums: Tensor | None = None,
    *,
    feature: str = "identity",
    two_sided: bool = False,
    scale: float = 1.0,
    normalised: bool = False,
    eps: float = 1e-6,
    decay_kind: str = "none",
    state_heads: int = 0,
    causal: bool = True,
    with_final: bool = False,
    with_total: bool = False,
    precision: str = "ieee",
    block_c: int = 64,
    block_v: int = 64,
    segment: int = 0,
    warps: int = 4,
    stages: int = 2,
    compiler: tuple[tuple[str, int], ...] = (),
) -> Any:
    """o_t = scale phi(q_t) S_t, where S_t = exp(g_t) S_{t-1} + phi(k_t)^T v_t.

    q `[batch, heads, S, D]`, k `[batch, kv_heads, S, D]`, v `[batch, kv_heads, S, V]` in fp16, bf16
    or fp32, their last dimension dense; the result is `[batch, heads, S, V]`, in memory
    `[batch, S, heads, V]`. `decay` is g, in float32: `[state_heads]` where `decay_kind` is "head",
    `[batch, state_heads, S]` where it is "token"; `state_heads` (0: kv_heads) is kv_heads or heads.
    `normalised` divides by scale phi(q_t) z_t + eps with z_t = exp(g_t) z_{t-1} + phi(k_t).
    `initial` `[batch, state_heads, features, V]` and `initial_sums` `[batch, state_heads,
    features]`, in float32, are what S and z start from.

    Returns the output; with `with_final`, also S after the last token, and z where `normalised`;
    with `with_total`, also what rows were divided by, `[batch, heads, S]` in float32. Not `causal`,
    every query reads the state after the last token. `segment` is a multiple of `block_c`, or 0;
    `compiler` are further options of Triton's compiler.
    Raises `ValueError` where there is no token.
    """
    if q.shape[2] == 0:
        raise ValueError("there is no token to attend from")
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, tokens, depth = q.shape
    width, holders = v.shape[3], state_heads or k.shape[1]
    made: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    out = torch.empty(batch, tokens, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    if decay is not None:
        decay = (decay[:, None] if decay_kind == "head" else decay).expand(batch, holders, tokens)
    sides = 2 if two_sided else 1
    final = final_sums = total = None
    if with_final:
        final = torch.empty(batch, holders, sides * depth, width, **made)
        if normalised:
            final_sums = torch.empty(batch, holders, sides * depth, **made)
    if with_total and not normalised:
        raise ValueError("rows are divided by something where they are normalised alone")
    if with_total:
        total = torch.empty(batch, heads, tokens, **made)
    chunked_recurrence(
        q, k, v, out, decay=decay, initial=initial, initial_sums=initial_sums, final=final,
        final_sums=final_sums, total=total, scale=scale, eps=eps, hook=decay_hook(decay_kind),
        key_map=feature_map(feature)[0], key_sides=sides, sums="keys" if normalised else "none",
        causal=causal, precision=precision, block_c=block_c, block_v=block_v, segment=segment,
        warps=warps, stages=stages, compiler=compiler,
    )  # fmt: skip
    given = tuple(x for x in (final, final_sums, total) if x is not None)
    return (out, *given) if given else out


@dataclass(frozen=True)
class LinearChunk(CompilerOptions, Kernel[LinearSpec]):
    """`linear_chunk` with its tile sizes: tokens of a chunk, values of a program, and tokens of a
    segment (0: all)."""

    name: ClassVar[str] = "linear_chunk"
    source: ClassVar[str] = "GAU (Hua et al. 2022), RetNet (Sun et al. 2023)"
    launcher = staticmethod(linear_chunk)

    block_c: int = choice(16, 32, 64, 128, default=64)
    block_v: int = choice(16, 32, 64, 128, 256, default=64)
    segment: int = choice(0, 128, 256, 512, 1024, 2048, 4096, 8192, default=0)
    warps: int = choice(2, 4, 8, default=4)
    stages: int = choice(1, 2, 3, 4, default=2)

    @classmethod
    def supports(cls, spec: LinearSpec, target: Target) -> Miss | None:
        wrong = unsupported(spec)
        if wrong is None and max(spec.features, spec.value_dim) > 64:
            wrong = below_ampere(target, "a state of more than 64 features spills registers")
        return wrong

    @classmethod
    def default(cls, spec: LinearSpec, target: Target, load: Load) -> Self:
        depth = padded_size(spec.key_dim)
        more = spec.normalised or spec.decay == "token" or depth > 128
        heavy = (1 + spec.two_sided) * (more and spec.feature != "identity")
        return cls(**tile_sizes(
            target, load, spec.heads, depth, depth * (2 if spec.two_sided else 1),
            spec.value_dim, heavy,
        ))  # fmt: skip

    @classmethod
    def inputs(cls, spec: LinearSpec, load: Load, device: str = "cpu") -> Inputs:
        made = partial(torch.randn, dtype=load.torch_dtype, device=device)
        given = {
            "q": made(load.batch, spec.heads, load.queries, spec.key_dim),
            "k": made(load.batch, spec.kv_heads, load.queries, spec.key_dim),
            "v": made(load.batch, spec.kv_heads, load.queries, spec.value_dim),
        }
        states = (load.batch, spec.states)
        if spec.decay == "head":
            given["decay"] = -0.1 * torch.rand(spec.states, device=device)
        if spec.decay == "token":
            given["decay"] = -0.1 * torch.rand(*states, load.queries, device=device)
        if spec.initial:
            given["initial"] = torch.rand(*states, spec.features, spec.value_dim, device=device)
            if spec.normalised:
                given["initial_sums"] = 1 + torch.rand(*states, spec.features, device=device)
        return given

    def constants(self, spec: LinearSpec) -> Mapping[str, Any]:
        return {
            **feature_arguments(spec), "decay_kind": spec.decay, "state_heads": spec.states,
            "causal": spec.causal, "with_final": spec.final, "block_c": self.block_c,
            "block_v": self.block_v, "segment": self.segment, "warps": self.warps,
            "stages": self.stages, "compiler": self.compiler,
        }  # fmt: skip

    @classmethod
    def reference(cls, spec: LinearSpec, inputs: Inputs) -> Outputs:
        out, final, sums = plain.linear_chunk(
            **inputs, **feature_arguments(spec), causal=spec.causal
        )
        group = spec.heads // spec.states
        if not spec.final:
            return out
        if not spec.normalised:
            return out, final[:, ::group]
        return out, final[:, ::group], sums[:, ::group]

    @classmethod
    def work(cls, spec: LinearSpec, load: Load) -> Work:
        tokens = load.batch * load.queries
        update = 2.0 * tokens * spec.heads * spec.features * spec.value_dim
        wide = spec.key_dim + spec.value_dim
        moved = tokens * (spec.heads + spec.kv_heads) * wide * load.torch_dtype.itemsize
        moved += 4 * tokens * spec.states * (spec.decay == "token")
        state = 4 * load.batch * spec.states * spec.features * (spec.value_dim + spec.normalised)
        moved += state * (spec.initial + spec.final)
        return Work(2 * update, float(moved))

    def traffic(self, spec: LinearSpec, load: Load) -> float:
        """The bytes that this kernel moves: those of `work`, and with segments the states that
        cross memory (written, scanned and read) and the keys and values that are read again."""
        least = self.work(spec, load).bytes
        if not self.segment or self.segment >= load.queries:
            return least
        segments = -(-load.queries // self.segment)
        state = 4 * load.batch * spec.states * spec.features * (spec.value_dim + spec.normalised)
        wide = spec.kv_heads * (spec.key_dim + spec.value_dim) * load.torch_dtype.itemsize
        again = load.batch * (load.queries - self.segment) * wide
        return float(least + again + state * (3 * segments + segments * spec.heads // spec.states))

    @classmethod
    def examples(cls) -> tuple[tuple[LinearSpec, Load], ...]:
        def retention(heads: int, depth: int) -> LinearSpec:
            return LinearSpec(heads, heads, depth, depth, scale=depth**-0.5, decay="head")

        sizes = ((4, 8, 256), (8, 32, 64), (8, 32, 128))
        plain_sizes = [
            (retention(heads, depth), Load(batch, tokens, tokens))
            for batch, heads, depth in sizes
            for tokens in (8192, 32768)
        ]
        gated = LinearSpec(32, 8, 128, 128, "elu", normalised=True, decay="token", final=True)
        hedgehog = LinearSpec(32, 8, 64, 64, "softmax", True, normalised=True, final=True)
        return (*plain_sizes, (gated, Load(1, 8192, 8192)), (hedgehog, Load(1, 8192, 8192)))


def unsupported(spec: LinearSpec) -> Miss | None:
    """Why no program can hold the spec's state, None where one can."""
    if spec.feature == "taylor":
        return Miss(
            "the state of second-order features has 1 + d + d^2 rows, too many for one program",
            help="a kernel of its own, which holds one channel's rows at a time",
        )
    if max(spec.features, spec.value_dim) > 256:
        return Miss(f"{max(spec.features, spec.value_dim)} features are more than 256")
    return None


def feature_arguments(spec: LinearSpec) -> dict[str, Any]:
    """The launcher's arguments for the feature map and the normaliser of a spec."""
    return {
        "feature": spec.feature, "two_sided": spec.two_sided, "scale": spec.scale,
        "normalised": spec.normalised, "eps": spec.eps,
    }  # fmt: skip


def tile_sizes(
    target: Target, load: Load, heads: int, depth: int, rows: int, width: int, heavy: int
) -> dict[str, int]:
    """Tile sizes for queries and keys of `depth` channels, states of `rows` rows and values of
    `width` channels; `heavy` as `tiles` takes it."""
    item = load.torch_dtype.itemsize
    if matrix_units(target, load.dtype):
        block_c, block_v, warps = tiles(target, item, rows, heavy)
    else:
        block_c, block_v, warps = 16, 16, (8 if rows > 64 else 4)
    block_v = min(block_v, padded_size(width))
    kept = rows * block_v * item
    streamed = block_c * (2 * depth + block_v) * item
    # Another block on the same unit hides a wait better than one more stage does, where registers
    # leave room for one.
    half = replace(target, shared_per_block=target.shared_per_unit // 2)
    stages = 0 if target.vendor == "amd" else stages_that_fit(half, kept, streamed, 3)
    if stages < 2:
        stages = stages_that_fit(target, kept, streamed, 3)
    if not direct(target):  # the stage in use is in registers
        few = target.vendor == "amd" or (target.capability == "12.0" and rows <= 64)
        stages = min(2 if few else 3, stages + 1)
    programs = load.batch * heads * triton.cdiv(width, block_v)
    return {
        "block_c": block_c, "block_v": block_v, "warps": warps, "stages": max(stages, 1),
        "segment": segment_length(load.queries, programs, 2 * target.units),
    }  # fmt: skip


def direct(target: Target) -> bool:
    """Whether matrix instructions read shared memory: Hopper and large Blackwell devices."""
    return target.capability in ("9.0", "10.0")


def tiles(target: Target, item: int, rows: int, heavy: int) -> tuple[int, int, int]:
    """Tokens, values and warps of a program whose state has `rows` rows, such that its registers
    hold the state and what it is multiplied with; `heavy` (1, or 2 where features have two sides or
    come in float32) says that it maps features and has more to do.

    Matrix instructions that read their operands from shared memory want 64 tokens; where operands
    are registers, fewer of everything fit.
    """
    if item > 2:
        return 16, 16, 4
    if direct(target):
        blackwell = target.capability == "10.0"  # whose products are not in registers
        warps = 8 if blackwell else 4
        if rows > 128:
            return (16, 32, 8) if heavy else (64, 32, warps)
        return (64, 32, warps) if rows > 64 and heavy > blackwell else (64, 64, warps)
    if target.vendor == "amd":
        if rows > 128:
            return 32, 32, 4
        if heavy and rows > 64:
            return 64, (16 if target.capability == "gfx90a" else 32), 4
        return 64, 64, 4
    if rows > 128:
        return 16, 16, (8 if heavy and target.capability == "12.0" else 4)
    if rows > 64:
        small = heavy > 1 or (heavy and target.capability == "12.0")
        return 32, (16 if small else 32), 4
    return 64, 32, 4


def segment_length(tokens: int, programs: int, units: int) -> int:
    """Tokens of a segment such that the programs fill the device, 0 where they do anyway."""
    segments = units // max(programs, 1)
    if segments < 2:
        return 0
    return min(8192, max(512, 1 << (-(-tokens // segments) - 1).bit_length()))
