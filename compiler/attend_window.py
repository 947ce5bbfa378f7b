"""Window attention in blocks: the backend "chunked", with memory and work linear in the length.

Queries are cut into blocks of C. Block b may read the keys from bC - (left - 1) to its own last
query (for a two-sided window also left - 1 further), so every block reads a slice of one size,
gathered once, plus the sink keys. The blocks then run as the heads of one ordinary attention, with
the query heads of a key/value head folded into the rows:

    q         [batch kv_heads, blocks, group C, head_dim]
    k and v   [batch kv_heads, blocks, slice + sink, .]
    mask      [1 or batch kv_heads, blocks, group C, slice + sink]

A sink key that also lies in the slice is read in the slice alone, so no key is counted twice. Only
aten operators with sizes computed from the inputs' shapes are used, so the function exports with
dynamic batch and length; a length under the window works.

Source: StreamingLLM (Xiao et al. 2023), equation of the sink mask; the block layout is the usual
one of local attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.compiler import attend
from attnopt.compiler.spec import FULL, AttentionSpec, Mask

# Rows of a block: below, calls are too small; above, too many masked logits are computed.
SMALLEST, LARGEST = 32, 128
_PAYS = 0.5  # share of the dense logits below which blocks are worth their gathered keys


def block_size(left: int) -> int:
    """Queries per block for a window of `left` keys.

    The power of two at or above it, kept between 32 and 128.
    """
    size = SMALLEST
    while size < min(left, LARGEST):
        size *= 2
    return size


def logits_per_query(mask: Mask) -> int:
    """How many logits `chunked` computes for each query, masked ones included.

    Independent of the length.
    """
    block = block_size(mask.left)
    return block + _before(mask) + _behind(mask) + mask.sink


def why_not(spec: AttentionSpec) -> str:
    """Empty when `chunked` computes this spec; otherwise the reason why not."""
    if spec.mask.kind != "window":
        return f"the mask is {spec.mask.kind}, not a window"
    if "sinks" in spec.extras:
        return "its blocks have no room for sink logits"
    return ""


def pays(spec: AttentionSpec, length: int) -> bool:
    """Whether blocks are expected to be faster than all logits, at this many keys.

    A `keep` or `bias` spans all queries and keys, and blocks would have to gather it.
    """
    if why_not(spec) or {"keep", "bias"} & set(spec.extras):
        return False
    return logits_per_query(spec.mask) <= _PAYS * length


def chunked(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    """Attention under a window mask, block by block; equal to `attend.reference`.

    q `[batch, heads, S, head_dim]`, k and v `[batch, kv_heads, T, .]`. Other masks go to
    `attend.sdpa`. A `bias` or `keep` that spans S x T is itself quadratic.
    """
    if why_not(spec):
        run = attend.in_torch(spec)
        return run(q, k, v, extras, spec)
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    block = block_size(spec.mask.left)
    # At least two, or an exported program would be bound to lengths of more than one block.
    blocks = torch.sym_max(2, (queries + block - 1) // block)
    i, j, keep = _positions(queries, keys, block, blocks, spec.mask, q.device)
    read = j.clamp(min=0).clamp(max=keys - 1)

    folded_q = _rows(q.index_select(2, i.reshape(-1)), spec, blocks, block)
    folded_k = _slices(k, read, spec, blocks)
    folded_v = _slices(v, read, spec, blocks)
    given, names = _blocked(extras, spec, i, read, keep, batch)
    inner = spec.with_(heads=1, kv_heads=1, mask=FULL, extras=names, fill="-inf")
    core = attend.reference if attend.runs_on_sdpa(spec) or spec.softmax32 else attend.sdpa
    out = core(folded_q, folded_k, folded_v, given, inner)

    if spec.fill == "min":
        out = _mean_where_empty(out, given[names.index("keep")], v, spec)
    out = out.reshape(batch, spec.kv_heads, blocks, spec.group, block, spec.v_dim)
    out = out.permute(0, 1, 3, 2, 4, 5).reshape(batch, spec.heads, blocks * block, spec.v_dim)
    return out.narrow(2, 0, queries)


def _before(mask: Mask) -> int:
    return mask.left - 1


def _behind(mask: Mask) -> int:
    return 0 if mask.causal else mask.left - 1


def _positions(
    queries: int, keys: int, block: int, blocks: int, mask: Mask, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Query positions, key positions (some out of range), and which keys each query keeps.

    `[blocks, block]`, `[blocks, slice + sink]` and bool `[blocks, block, slice + sink]`. The last
    block's surplus queries repeat the last real one, so that no row is empty; they are cut off.
    """
    first = torch.arange(blocks, device=device)[:, None] * block
    i = (first + torch.arange(block, device=device)[None, :]).clamp(max=queries - 1)
    span = block + _before(mask) + _behind(mask)
    near = first - _before(mask) + torch.arange(span, device=device)[None, :]
    keep = _inside(near, keys) & _near(i, near, mask)
    if not mask.sink:
        return i, near, keep
    sink = torch.arange(mask.sink, device=device)[None, :].expand(blocks, mask.sink)
    far = _inside(sink, keys) & ~_near(i, sink, mask) & mask.keep(i[:, :, None], sink[:, None, :])
    return i, torch.cat((near, sink), dim=1), torch.cat((keep, far), dim=2)


def _inside(j: Tensor, keys: int) -> Tensor:
    return ((j >= 0) & (j < keys))[:, None, :]


def _near(i: Tensor, j: Tensor, mask: Mask) -> Tensor:
    bare = Mask("window", left=mask.left, sink=0, causal=mask.causal)
    return bare.keep(i[:, :, None], j[:, None, :])  # type: ignore[no-any-return]


def _rows(x: Tensor, spec: AttentionSpec, blocks: int, block: int) -> Tensor:
    """[batch, heads, blocks block, d] to [batch kv_heads, blocks, group block, d]."""
    x = x.reshape(-1, spec.kv_heads, spec.group, blocks, block, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, blocks, spec.group * block, x.shape[-1])


def _slices(x: Tensor, read: Tensor, spec: AttentionSpec, blocks: int) -> Tensor:
    """[batch, kv_heads, T, d] to [batch kv_heads, blocks, slice + sink, d]."""
    x = x.index_select(2, read.reshape(-1))
    return x.reshape(-1, blocks, read.shape[1], x.shape[-1])


def _blocked(
    extras: Sequence[Tensor],
    spec: AttentionSpec,
    i: Tensor,
    read: Tensor,
    keep: Tensor,
    batch: int,
) -> tuple[list[Tensor], tuple[str, ...]]:
    """The extras of the folded attention: `keep` always, `bias` where there is one."""
    blocks, block, span = keep.shape
    own = attend.extra(extras, spec, "keep")
    padding = attend.extra(extras, spec, "padding")
    joined = keep[None, None]
    if own is not None:
        joined = joined & _cut(own, i, read)
    if padding is not None:
        joined = joined & padding[:, read][:, None, :, None, :]
    shape = (blocks, block, span)
    given, names = [_fold(joined, spec, batch, shape)], ("keep",)
    bias = attend.extra(extras, spec, "bias")
    if bias is None:
        return given, names
    return [*given, _fold(_cut(bias, i, read), spec, batch, shape)], (*names, "bias")


def _cut(x: Tensor, i: Tensor, read: Tensor) -> Tensor:
    """The blocks of a tensor that broadcasts to `[batch, heads, S, T]`.

    Answers `[batch or 1, heads or 1, blocks, block or 1, slice or 1]`.
    """
    while x.dim() < 4:
        x = x.unsqueeze(0)
    rows = torch.zeros_like(i[:, :1]) if x.shape[2] == 1 else i
    columns = torch.zeros_like(read[:, :1]) if x.shape[3] == 1 else read
    return x[:, :, rows[:, :, None], columns[:, None, :]]


def _fold(x: Tensor, spec: AttentionSpec, batch: int, shape: tuple[int, int, int]) -> Tensor:
    """What `_cut` gives as `[batch kv_heads or 1, blocks, group block, slice]`."""
    blocks, block, span = shape
    x = x.expand(x.shape[0], x.shape[1], blocks, block, span)
    if x.shape[0] == 1 and x.shape[1] == 1:
        grouped = x.reshape(1, 1, blocks, 1, block, span)
        wide = grouped.expand(1, 1, blocks, spec.group, block, span)
        return wide.reshape(1, blocks, spec.group * block, span)
    x = x.expand(batch, spec.heads, blocks, block, span)
    return _rows(x.reshape(batch, spec.heads, blocks * block, span), spec, blocks, block)


def _mean_where_empty(out: Tensor, keep: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """With the fill "min" a query that reads no key gets the mean over all keys, as the definition
    has it.
    """
    mean = v.mean(2).reshape(-1, 1, 1, v.shape[-1])
    return torch.where(keep.any(-1, keepdim=True), out, mean.to(out.dtype))
