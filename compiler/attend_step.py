"""Attention of new tokens to the keys of a cache: in plain torch, or on a GPU, for the backend
"triton", by what is dispatched there.

Extras are those of the new rows, `[..., S, T]` for S queries and T keys; shapes otherwise as in
`attnopt.compiler.spec`. `line` is the text of the spec, which torch.compile could not make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from attnopt.compiler import attend, native
from attnopt.compiler.attend_split import parts_for, split_keys
from attnopt.compiler.spec import FULL, AttentionSpec


def among(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec, line: str
) -> Tensor:
    """Attention among the tokens of a prompt."""
    if spec.backend == "triton" and traced(q):
        made: Tensor = torch.ops.attnopt.attention.default(q, k, v, extras, line)
        return made
    return attend.run(q, k, v, extras, spec)


def to_newest(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec, line: str
) -> Tensor:
    """Attention of the newest tokens to the keys of all tokens, in order; their own come last."""
    if on_gpu(spec, q):
        return _dispatched(q, k, v, extras, spec, line, k.shape[2], False)
    return newest(q, k, v, extras, spec)


def to_ring(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec, line: str,
    end: Any,
) -> Tensor:  # fmt: skip
    """Attention of the newest of `end` tokens to a ring that holds their keys too (see
    `positions`); the extras are those of its slots."""
    if on_gpu(spec, q):
        return _dispatched(q, k, v, extras, spec, line, end, True)
    return ringed(q, k, v, extras, spec, end)


def newest(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    """`to_newest` in plain torch."""
    new, end = q.shape[2], k.shape[2]
    if new == 1:
        return to_all(q, k, v, extras, spec)
    j = torch.arange(end, device=q.device)
    return to_positions(q, k, v, extras, spec, end - new + j[:new], j)


def ringed(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec, end: Any
) -> Tensor:
    """`to_ring` in plain torch."""
    new = q.shape[2]
    i = end - new + torch.arange(new, device=q.device)
    held = positions(k, spec.mask.sink, end)
    if spec.fill == "min" and {"keep", "padding"} & {*spec.extras}:
        return _held(q, k, v, extras, spec, i, held)
    return to_positions(q, k, v, extras, spec, i, held)


def _held(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec,
    i: Tensor, j: Tensor,
) -> Tensor:  # fmt: skip
    """`to_positions` where a query without a key gives the mean of all values: of those that are
    held, which a bias of -inf tells from empty slots."""
    by_name = dict(zip(spec.extras, extras, strict=True))
    keep = spec.mask.keep(i[:, None], j[None, :])[None, None]
    if (given := by_name.pop("keep", None)) is not None:
        keep = keep & given
    if (padding := by_name.pop("padding", None)) is not None:
        keep = keep & padding[:, None, None, :]
    empty = torch.where(j >= 0, 0.0, float("-inf")).to(q.dtype)[None, None, None, :]
    by_name["bias"] = empty + by_name["bias"] if "bias" in by_name else empty
    by_name["keep"] = keep | (j < 0)
    return to_all(q, k, v, [*by_name.values()], spec.with_(extras=tuple(by_name)))


def positions(keys: Tensor, sink: int, length: Any) -> Tensor:
    """The position that each slot of a ring holds after `length` tokens, -1 where none, `[slots]`.

    Token p lies in slot p while p < sink, else in turn in the slots behind these.
    """
    slot = torch.arange(keys.shape[2], device=keys.device)
    last = length - 1
    turned = last - (last - slot) % max(keys.shape[2] - sink, 1)
    held = torch.where(slot < sink, slot, torch.where(turned < sink, -1, turned))
    return torch.where(held < length, held, -1)


def on_gpu(spec: AttentionSpec, q: Tensor) -> bool:
    """Whether a step is dispatched (`attnopt.codegen.step_dispatch`)."""
    return spec.backend == "triton" and is_gpu(q)


def is_gpu(q: Tensor) -> bool:
    """Whether a tensor is on a device that kernels are generated for."""
    return q.device.type == "cuda"


def traced(q: Tensor) -> bool:
    """Whether a compiler looks on, which has to be shown an operator."""
    return torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter)


@lru_cache(maxsize=8)
def dispatching(name: str) -> Callable[..., Tensor]:
    """A function of `attnopt.codegen.step_dispatch`, which builds on this module."""
    found: Callable[..., Tensor] = getattr(import_module("attnopt.codegen.step_dispatch"), name)
    return found


def _dispatched(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec, line: str,
    end: Any, ring: bool,
) -> Tensor:  # fmt: skip
    if traced(q):
        made: Tensor = torch.ops.attnopt.attention_step(q, k, v, extras, line, end, ring)
        return made
    return dispatching("attention_step")(q, k, v, extras, spec, end, ring)


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
    run = attend.in_torch(spec)
    return run(q, k, v, extras, spec).reshape(batch, heads, new, v.shape[-1])


def _compiled(*operands: Tensor) -> bool:
    """Whether a compiled step is traced for which the operators in C++ were built; they have no
    gradients, and an exported graph would need them elsewhere."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    dtypes = {x.dtype for x in operands}
    fits = len(dtypes) == 1 and dtypes <= native.DTYPES and operands[0].device.type == "cpu"
    return fits and not torch.is_grad_enabled() and native.loaded()


def _as_rows(extra: Tensor, group: int) -> Tensor:
    """An extra `[..., heads or 1, 1, T]` with the heads of a group as rows."""
    if extra.dim() < 3 or extra.shape[-3] == 1:
        return extra
    return extra.reshape(*extra.shape[:-3], -1, group, extra.shape[-1])
