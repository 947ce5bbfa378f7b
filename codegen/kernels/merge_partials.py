"""Partial results of attention over disjoint sets of keys, merged by their log-sum-exps.

With outputs o_p and log-sum-exps l_p of the sets p: l = log sum_p exp(l_p) and
o = sum_p exp(l_p - l) o_p, exactly what attention over all keys gives. Splits of a long cache, sink
tokens beside a window, and a shared prefix beside each sequence's own keys all end here. A set
without keys has the log-sum-exp -inf, and its output is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.codegen.kernel import Inputs, Kernel, Load, Outputs, Work
from attnopt.codegen.kernels.references import merge_partials as plain
from attnopt.codegen.pieces.online_softmax import FLOOR, LOG2E
from attnopt.codegen.pieces.rows import by_token, dense_rows
from attnopt.codegen.pieces.sizes import ceil_div, padded_size
from attnopt.codegen.target import Target
from attnopt.compiler import text
from attnopt.compiler.contract import Miss, choice

_TILE = 2048  # float32 numbers that a program of 4 warps holds without trouble


@triton.jit
def _merge_partials(
    stacks, out, lse, rows, heads, queries,
    out_batch, out_head, out_token, lse_batch, lse_head, lse_token,
    V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b = row // (heads * queries)
    h = row // queries % heads
    t = row % queries
    n = tl.arange(0, BLOCK_PARTS)
    e = tl.arange(0, BLOCK_V)
    top = tl.full([BLOCK_ROWS], FLOOR, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.float32)
    for which in tl.static_range(len(stacks)):
        (parts, part, batch, head, token, sums, sum_part, sum_batch, sum_head, sum_token, count) = (
            stacks[which]
        )
        sum_at = (b * sum_batch + h * sum_head + t * sum_token)[:, None]
        part_at = (b * batch + h * head + t * token)[:, None, None]
        for first in tl.range(0, count, BLOCK_PARTS):
            p = first + n
            logits = tl.load(
                sums + sum_at + p.to(tl.int64)[None, :] * sum_part,
                mask=(row < rows)[:, None] & (p < count)[None, :], other=float("-inf"),
            )  # fmt: skip
            logits = logits.to(tl.float32)
            higher = tl.maximum(top, tl.max(logits, 1))
            kept = tl.exp2((top - higher) * LOG2E)
            weights = tl.exp2((logits - higher[:, None]) * LOG2E)
            tile = tl.load(
                parts + part_at + (p.to(tl.int64) * part)[None, :, None] + e[None, None, :],
                mask=(logits > float("-inf"))[:, :, None] & (e < V)[None, None, :], other=0.0,
            )  # fmt: skip
            total = total * kept + tl.sum(weights, 1)
            acc = acc * kept[:, None] + tl.sum(weights[:, :, None] * tile.to(tl.float32), 1)
            top = higher
    some = total > 0
    safe = tl.where(some, total, 1.0)
    result = acc / safe[:, None]
    out_at = (b * out_batch + h * out_head + t * out_token)[:, None] + e[None, :]
    there = (row < rows)[:, None] & (e < V)[None, :]
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=there)
    if lse is not None:
        ended = tl.where(some, top + tl.log(safe), float("-inf"))
        tl.store(lse + b * lse_batch + h * lse_head + t * lse_token, ended, mask=row < rows)


def _stack(parts: Tensor, sums: Tensor) -> tuple[Tensor | int, ...]:
    """Some results and their log-sum-exps with the strides of both, and how many there are."""
    parts, strides = dense_rows(parts)
    return parts, *strides, sums, *sums.stride(), parts.shape[0]


def merge_partials(
    parts: Tensor | tuple[Tensor, ...],
    lse: Tensor | tuple[Tensor, ...],
    out: Tensor | None = None,
    *,
    with_lse: bool = False,
    block_rows: int = 1,
    block_parts: int = 16,
    warps: int = 4,
) -> Any:
    """Attention over all keys from attention over disjoint sets of them.

    `parts` `[parts, batch, heads, S, V]` of any float dtype with the natural log-sum-exps `lse`
    `[parts, batch, heads, S]` in float32; or tuples of both, for results that lie apart. The
    result `[batch, heads, S, V]` is written to `out` where given (its last dimension dense, in its
    dtype), and returned with the log-sum-exps `[batch, heads, S]` in float32 where `with_lse`. A
    query whose every set is empty gives zeros and -inf. Raises `ValueError` where `out` is not
    dense in its last dimension.
    """
    if isinstance(parts, Tensor) and isinstance(lse, Tensor):
        pairs = [(parts, lse)]
    else:
        pairs = [*zip(parts, lse, strict=True)]
    stacks, first = tuple([_stack(*pair) for pair in pairs]), pairs[0][0]
    _, batch, heads, queries, width = first.shape
    if out is None:
        out = by_token(first, batch, heads, queries, width)
    *strides, dense = out.stride()
    if dense != 1:
        raise ValueError("what is written to must be dense in its last dimension")
    merged = None
    if with_lse:
        merged = torch.empty(batch, heads, queries, dtype=torch.float32, device=out.device)
    count = batch * heads * queries
    _merge_partials[(ceil_div(count, block_rows),)](
        stacks, out, merged, count, heads, queries,
        *strides, *((0, 0, 0) if merged is None else merged.stride()),
        V=width, BLOCK_V=padded_size(width), BLOCK_ROWS=block_rows, BLOCK_PARTS=block_parts,
        num_warps=warps,
    )  # fmt: skip
    return out if merged is None else (out, merged)


@dataclass(frozen=True)
class MergeSpec:
    """Results of attention of `heads` query heads over `parts` sets of keys, `v_dim` wide."""

    heads: int
    v_dim: int
    parts: int
    name: str = field(default="merge", init=False, repr=False)

    @property
    def text(self) -> str:
        """The spec as one line."""
        return text.dump(self)


@dataclass(frozen=True)
class MergePartials(Kernel[MergeSpec]):
    """`merge_partials` with its tile sizes."""

    name: ClassVar[str] = "merge_partials"
    source: ClassVar[str] = "Flash-Decoding (Dao, Haziza, Massa and Sizov 2023)"
    launcher = staticmethod(merge_partials)

    block_rows: int = choice(1, 2, 4, 8, 16, 32, default=1)
    block_parts: int = choice(1, 2, 4, 8, 16, 32, default=16)
    warps: int = choice(1, 2, 4, 8, default=4)

    @classmethod
    def supports(cls, spec: MergeSpec, target: Target) -> Miss | None:
        if spec.v_dim > 1024:
            return Miss(f"v_dim {spec.v_dim} is more than 1024")
        return None

    @classmethod
    def default(cls, spec: MergeSpec, target: Target, load: Load) -> Self:
        parts = min(16, triton.next_power_of_2(spec.parts), _TILE // padded_size(spec.v_dim))
        rows = load.batch * spec.heads * load.queries
        room = max(1, _TILE // (padded_size(spec.v_dim) * parts))
        fill = max(1, rows // (2 * max(1, target.units)))  # two programs for each unit come first
        return cls(min(32, room, 1 << (fill.bit_length() - 1)), parts, 4)

    @classmethod
    def inputs(cls, spec: MergeSpec, load: Load, device: str = "cpu") -> Inputs:
        shape = (spec.parts, load.batch, spec.heads, load.queries)
        rows = torch.empty(
            load.batch, load.queries, spec.heads, spec.v_dim, dtype=load.torch_dtype, device=device
        )
        return {
            "parts": torch.randn(*shape, spec.v_dim, device=device),
            "lse": torch.randn(shape, device=device),
            "out": rows.transpose(1, 2),
        }

    def constants(self, spec: MergeSpec) -> Mapping[str, Any]:
        return {
            "block_rows": self.block_rows, "block_parts": self.block_parts, "warps": self.warps,
        }  # fmt: skip

    @classmethod
    def reference(cls, spec: MergeSpec, inputs: Inputs) -> Outputs:
        return plain.merge_partials(**inputs)[0]

    @classmethod
    def work(cls, spec: MergeSpec, load: Load) -> Work:
        rows = load.batch * spec.heads * load.queries
        read = rows * spec.parts * (spec.v_dim + 1) * 4
        written = rows * spec.v_dim * load.torch_dtype.itemsize
        return Work(2.0 * rows * spec.parts * spec.v_dim, float(read + written))

    @classmethod
    def examples(cls) -> tuple[tuple[MergeSpec, Load], ...]:
        return (
            (MergeSpec(64, 64, 4), Load(8, 1)),
            (MergeSpec(64, 128, 16), Load(1, 1)),
            (MergeSpec(128, 512, 8), Load(4, 1)),
            (MergeSpec(32, 128, 2), Load(1, 8192)),
        )
