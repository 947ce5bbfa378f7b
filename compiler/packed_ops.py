"""Operators on packed tokens `[N, ...]`: the real tokens of a padded batch `[B, S, ...]`, laid end
to end.

`pack_index` says which tokens are kept and where they came from, `packed_attention` attends within
each sequence, and `unpack` puts the tokens back. Sequences are ordered by length, so that sequences
of one length lie side by side and run as one batched attention on views. All branches on values are
inside the operators: an export holds only their calls.

Importing this module registers the operators; a saved program that holds them needs it imported
before it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnopt.compiler import attend
from attnopt.compiler.spec import FULL, AttentionSpec, parse_spec

SHORT = 160  # tokens up to which plain products beat the fused kernel on a CPU
PRECISE = (torch.float32, torch.float64)  # dtypes that scores may be kept in


@torch.library.custom_op("attnopt::pack_index", mutates_args=())
def pack_index(
    padding: Tensor, columns: Sequence[int], whole_empty: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Which positions of a batch are computed: `(index int64 [N], offsets int64 [B+1], keys bool
    [N] or [0])`.

    `padding` bool `[B, S]` is True at real tokens. Position b * S + s is kept when it is real, when
    s is one of `columns` (negative ones count from the end), or, with `whole_empty`, when row b has
    no real token. `index` lists the kept positions, sequence after sequence, ordered by length;
    `offsets` are the sequences' bounds in it. `keys` says which kept positions are real, and is
    empty when all of them are.
    """
    kept = padding
    if columns:
        kept = padding.clone()
        kept[:, [c for c in columns if -kept.shape[1] <= c < kept.shape[1]]] = True
    if whole_empty:
        kept = kept | ~padding.any(1, keepdim=True)
    lengths = kept.sum(1)
    offsets = lengths.new_zeros(len(lengths) + 1)
    if bool((lengths == lengths[:1]).all()):
        torch.cumsum(lengths, 0, out=offsets[1:])
        index = kept.reshape(-1).nonzero().squeeze(1)
    else:
        order = lengths.argsort(stable=True)
        torch.cumsum(lengths[order], 0, out=offsets[1:])
        rows, columns_ = kept[order].nonzero().unbind(1)
        index = order[rows] * kept.shape[1] + columns_
    keys = padding.new_empty(0)
    if kept is not padding and not torch.equal(kept, padding):
        keys = padding.reshape(-1)[index]
    return index, offsets, keys


@pack_index.register_fake
def _(padding: Tensor, columns: Sequence[int], whole_empty: bool) -> tuple[Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    count, flags = context.new_dynamic_size(), context.new_dynamic_size()
    whole = torch.int64
    return (
        padding.new_empty(count, dtype=whole),
        padding.new_empty(padding.shape[0] + 1, dtype=whole),
        padding.new_empty(flags),
    )


@torch.library.custom_op("attnopt::packed_attention", mutates_args=())
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str,
    index: Tensor, offsets: Tensor, keys: Tensor, seq: int,
) -> Tensor:  # fmt: skip
    """Attention within each sequence: q `[N, heads, head_dim]`, k `[N, kv_heads, head_dim]`, v `[N,
    kv_heads, v_dim]`.

    `spec` is the padded attention's spec without its `padding`; `extras` are its bias and keep,
    still of the padded shape (broadcastable to `[B, heads, S, S]`). `index`, `offsets` and `keys`
    come from `pack_index`, `seq` is S. Masks speak of the positions that tokens had before packing.
    Returns `[N, heads, v_dim]`, in memory of its own.
    """
    read = parse_spec(spec)
    plain = _plain(read, extras, keys)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    heads_first = [x.transpose(0, 1) for x in (q, k, v, out)]
    for start, count, length in _runs(offsets.tolist()):
        if count == 1 and length <= SHORT and plain and q.dtype in PRECISE:
            one = [x[:, start : start + length] for x in heads_first]
            _short(one[0], one[1], one[2], one[3], read.scale)
        else:
            part = slice(start, start + count * length)
            out[part] = _group(
                q[part], k[part], v[part], extras, read, index[part], keys[part], seq, count
            )
    return out


@packed_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str,
    index: Tensor, offsets: Tensor, keys: Tensor, seq: int,
) -> Tensor:  # fmt: skip
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


@torch.library.custom_op("attnopt::unpack", mutates_args=())
def unpack(x: Tensor, index: Tensor, batch: int, seq: int, fill: float) -> Tensor:
    """Packed `[N, ...]` back to `[batch, seq, ...]`; positions that were not kept hold `fill`."""
    shape = (batch * seq, *x.shape[1:])
    out = x.new_empty(shape) if len(index) == batch * seq else x.new_full(shape, fill)
    return out.index_copy_(0, index, x).view(batch, seq, *x.shape[1:])


@unpack.register_fake
def _(x: Tensor, index: Tensor, batch: int, seq: int, fill: float) -> Tensor:
    return x.new_empty((batch, seq, *x.shape[1:]))


def _runs(offsets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of neighbouring sequences of one length, as (first token, sequences, length); empty
    sequences have none."""
    first = 0
    while first + 1 < len(offsets):
        length = offsets[first + 1] - offsets[first]
        last = first + 1
        while last + 1 < len(offsets) and offsets[last + 1] - offsets[last] == length:
            last += 1
        if length:
            yield offsets[first], last - first, length
        first = last


def _group(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec,
    index: Tensor, keys: Tensor, seq: int, count: int,
) -> Tensor:  # fmt: skip
    """Attention of `count` sequences of one length, their tokens end to end: `[count * length,
    heads, v_dim]`."""
    length = len(index) // count
    q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
    position = index.view(count, length)
    spec = _simplest(spec, position, seq)
    if not extras and spec.mask.kind != "window" and not len(keys) and not spec.softcap:
        causal = spec.mask.kind == "causal"
        out = attend.fused(q, k, v, is_causal=causal, scale=spec.scale, enable_gqa=spec.group > 1)
        return out.transpose(1, 2).reshape(count * length, *out.shape[1:4:2])
    flags = keys.view(count, length) if len(keys) else None
    inner, names = _local(extras, spec, position, flags, seq)
    local = spec.with_(mask=FULL, extras=names)
    run = attend.in_torch(local)
    out = run(q, k, v, inner, local)
    return out.transpose(1, 2).reshape(count * length, *out.shape[1:4:2])


def _plain(spec: AttentionSpec, extras: Sequence[Tensor], keys: Tensor) -> bool:
    """Whether every token of a sequence attends to every other, each head with a key/value head of
    its own."""
    masked = spec.mask.kind != "full" or len(extras) or len(keys)
    return not masked and spec.group == 1 and not spec.softcap


def _short(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
    """One short sequence `[heads, length, dim]` by plain products, written to `out`.

    At these sizes the fused kernel's set-up costs more than the score matrix that it saves.
    """
    scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)
    out.copy_(torch.bmm(scores.softmax(-1), v))


def _simplest(spec: AttentionSpec, position: Tensor, seq: int) -> AttentionSpec:
    """The spec without a window that reaches as far as these sequences do."""
    mask = spec.mask
    if mask.kind != "window":
        return spec
    if seq > mask.left and int((position[:, -1] - position[:, 0]).max()) >= mask.left:
        return spec
    return spec.with_(mask=type(mask)("causal") if mask.causal else FULL)


def _local(
    extras: Sequence[Tensor], spec: AttentionSpec, position: Tensor, keys: Tensor | None, seq: int
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Bias and keep of some sequences, `[count, heads or 1, length, length]`: cut from the padded
    ones, joined with the mask."""
    row, column = position[:, 0] // seq, position % seq
    i, j = column[:, None, :, None], column[:, None, None, :]
    keep = None if spec.mask.kind == "full" else spec.mask.keep(i, j)
    if keys is not None:
        keep = keys[:, None, None, :] if keep is None else keep & keys[:, None, None, :]
    given = attend.extra(extras, spec, "keep")
    if given is not None:
        cut = _cut(given, row, column)
        keep = cut if keep is None else keep & cut
    bias = attend.extra(extras, spec, "bias")
    found = {"bias": None if bias is None else _cut(bias, row, column), "keep": keep}
    return [x for x in found.values() if x is not None], tuple(
        n for n, x in found.items() if x is not None
    )


def _cut(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The part of `[B or 1, H or 1, S or 1, S or 1]` that some sequences see: `[count or 1, H or 1,
    n or 1, n or 1]`."""
    x = x[(None,) * (4 - x.dim())]
    many = len(row) > 1 and (x.shape[0] > 1 or not bool((column == column[:1]).all()))
    if not many:
        x = x[row[:1]] if x.shape[0] > 1 else x
        x = x.index_select(2, column[0]) if x.shape[2] > 1 else x
        return x.index_select(3, column[0]) if x.shape[3] > 1 else x
    b = row[:, None, None] if x.shape[0] > 1 else torch.zeros_like(row)[:, None, None]
    i = column[:, :, None] if x.shape[2] > 1 else torch.zeros_like(column[:, :1])[:, :, None]
    j = column[:, None, :] if x.shape[3] > 1 else torch.zeros_like(column[:, :1])[:, None, :]
    return x.permute(0, 2, 3, 1)[b, i, j].permute(0, 3, 1, 2)


PACK_INDEX = torch.ops.attnopt.pack_index.default
PACKED_ATTENTION = torch.ops.attnopt.packed_attention.default
UNPACK = torch.ops.attnopt.unpack.default
