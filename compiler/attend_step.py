"""Attention of new tokens to the keys of a cache, in plain torch.

Extras are those of the new rows, `[..., S, T]` for S queries and T keys; shapes otherwise as in
`attnopt.compiler.spec`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.compiler import attend, native
from attnopt.compiler.attend_split import parts_for, split_keys
from attnopt.compiler.spec import FULL, AttentionSpec


def to_positions(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec,
    i: Tensor, j: Tensor,
) -> Tensor:  # fmt: skip
    """Attention of queries at positions `i` `[S]` to keys at positions `j` `[T]`, of which
    negative ones hold no key."""
    keep = (spec.mask.keep(i[:, None], j[None, :]) & (j >= 0)[None, :])[None, None]
    given = attend.extra(extras, spec, "keep")
    names = [name for name in spec.extras if name != "keep"]
    rest = [x for name, x in zip(spec.extras, extras, strict=True) if name != "keep"]
    masked = spec.with_(extras=(*names, "keep"))
    return to_all(q, k, v, [*rest, keep if given is None else keep & given], masked)


def to_all(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    """Attention to all keys that the extras keep, whatever the spec's mask class.

    Where there is one query, the query heads that share a key/value head are rows of one product,
    so that keys and values are read once; where they are all one head, threads share the keys.
    """
    batch, heads, new, dim = q.shape
    spec = spec.with_(mask=FULL)
    if new == 1 and spec.group > 1:
        q = q.reshape(batch, spec.kv_heads, spec.group, dim)
        extras = [
            x if name == "padding" else _as_rows(x, spec.group)
            for name, x in zip(spec.extras, extras, strict=True)
        ]
        spec = spec.with_(heads=spec.kv_heads)
    if new == 1 and not spec.extras and not spec.softcap:
        if _compiled(q, k, v):
            made = torch.ops.attnopt.one_token(q, k, v, spec.scale)
            return made.reshape(batch, heads, new, v.shape[-1])  # type: ignore[no-any-return]
        if (parts := parts_for(q, k, v)) > 1:
            return split_keys(q, k, v, spec.scale, parts).reshape(batch, heads, new, v.shape[-1])
    run = attend.reference if attend.runs_on_sdpa(spec) else attend.sdpa
    return run(q, k, v, extras, spec).reshape(batch, heads, new, v.shape[-1])


def _compiled(*operands: Tensor) -> bool:
    """Whether a compiled step is traced for which the operators in C++ were built; they have no
    gradients, and an exported graph would need them elsewhere."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    fits = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in operands)
    return fits and not torch.is_grad_enabled() and native.loaded()


def _as_rows(extra: Tensor, group: int) -> Tensor:
    """An extra `[..., heads or 1, 1, T]` with the heads of a group as rows."""
    if extra.dim() < 3 or extra.shape[-3] == 1:
        return extra
    return extra.reshape(*extra.shape[:-3], -1, group, extra.shape[-1])
