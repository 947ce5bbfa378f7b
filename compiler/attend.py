"""Attention in plain torch, by backend name: what the op runs and what lowering inlines.

The op is `attnopt::attention`. Every function takes q `[batch, heads, S, head_dim]`,
k `[batch, kv_heads, T, head_dim]`, v `[batch, kv_heads, T, v_dim]`, the extras in the order of
`spec.extras`, and the spec; it returns `[batch, heads, S, v_dim]` in q's dtype (under autocast in
that of autocast). All are traceable by `torch.export` with dynamic batch and lengths, so a lowered
program holds aten operators only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import AttentionSpec

Backend = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], AttentionSpec], Tensor]


def reference(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    """The definition, with the whole score matrix in memory.

    Every other backend is tested against it.
    """
    return torch.matmul(weights(q, k, extras, spec).to(v.dtype), repeated(v, spec.group))


def weights(q: Tensor, k: Tensor, extras: Sequence[Tensor], spec: AttentionSpec) -> Tensor:
    """The softmax weights `[batch, heads, S, T]` of the definition; zeros in a row that reads no
    key (fill "-inf"). Sinks take their share of each row."""
    logits = torch.matmul(q, repeated(k, spec.group).transpose(-1, -2)) * spec.scale
    if spec.softcap:
        logits = torch.tanh(logits / spec.softcap) * spec.softcap
    bias = extra(extras, spec, "bias")
    if bias is not None:
        logits = logits + bias
    if spec.softmax32:
        logits = logits.float()
    keep = kept(q, k, extras, spec)
    if keep is not None:
        lowest = torch.finfo(logits.dtype).min if spec.fill == "min" else float("-inf")
        logits = logits.masked_fill(~keep, lowest)
    sinks = extra(extras, spec, "sinks")
    if sinks is not None:
        column = sinks.to(logits.dtype).expand(*logits.shape[:-1], 1)
        return torch.cat((logits, column), -1).softmax(-1)[..., :-1]
    if spec.fill == "min" or (keep is None and bias is None):
        return logits.softmax(-1)
    empty = (logits == float("-inf")).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def sdpa(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec) -> Tensor:
    """Torch's fused scaled_dot_product_attention.

    It has no soft cap: `runs_on_sdpa` says so beforehand. Sinks become a key and a value of zeros
    whose bias is the sink. Rows that read no key (fill "min") have the outputs of the reference,
    not its gradients. Run eagerly on a CPU, a padding that drops nothing is left out, so that a
    causal mask stays a flag.
    """
    grouped = False
    if spec.group > 1:  # asked, since torch.compile may trace sizes as symbols
        grouped = True
    padding = extra(extras, spec, "padding")
    if padding is not None and _drops_nothing(padding):
        extras = [x for x in extras if x is not padding]
        spec = _without_padding(spec)
    if spec.mask.kind == "causal" and not spec.extras:
        return fused(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=grouped)
    mask = _sdpa_mask(q, k, extras, spec)
    if mask is not None and mask.dtype == torch.float16:
        # Its lowest number does not absorb a score that the kernel adds in float32: in a row that
        # reads no key it would leave the scores, so these are made equal.
        empty = (mask <= torch.finfo(torch.float16).min).all(-1, keepdim=True)
        q = q.masked_fill(empty, 0.0)
    sinks = extra(extras, spec, "sinks")
    if sinks is not None:
        mask = with_sinks(q, k, mask, sinks)
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    return fused(q, k, v, attn_mask=mask, scale=spec.scale, enable_gqa=grouped)


def fused(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """Torch's operator, q `[..., S, head_dim]`, k `[..., T, head_dim]`, v `[..., T, v_dim]`; `how`
    are its arguments by name, with a scale.

    On a CPU it is fused only where keys and values are of one width. So for many queries the
    narrower get zeros, which change neither scores nor outputs, in saved graphs as well; for one
    query, which has no scores to save, a copy of the keys would cost more.
    """
    width, v_dim = q.shape[-1], v.shape[-1]
    if q.device.type != "cpu" or width == v_dim or q.shape[-2] == 1:
        return F.scaled_dot_product_attention(q, k, v, **how)
    if width < v_dim:
        q, k = (F.pad(x, (0, v_dim - width)) for x in (q, k))
    else:
        v = F.pad(v, (0, width - v_dim))
    return F.scaled_dot_product_attention(q, k, v, **how)[..., :v_dim]


def runs_on_sdpa(spec: AttentionSpec) -> str:
    """Empty when `sdpa` computes this spec; otherwise the reason why not."""
    if spec.softcap:
        return "scaled_dot_product_attention has no logit soft cap"
    return ""


def in_torch(spec: AttentionSpec) -> Backend:
    """The best of torch's own for a spec: `sdpa`, or the reference where it does not compute it."""
    return reference if runs_on_sdpa(spec) else sdpa


def _drops_nothing(padding: Tensor) -> bool:
    """Whether every key is real, where asking is cheap: not while tracing, and not on a device that
    would stall."""
    if torch.compiler.is_compiling() or type(padding) is not Tensor:
        return False
    return padding.device.type == "cpu" and bool(padding.all())


@lru_cache(maxsize=256)
def _without_padding(spec: AttentionSpec) -> AttentionSpec:
    return spec.with_(extras=tuple(name for name in spec.extras if name != "padding"))


def kept(q: Tensor, k: Tensor, extras: Sequence[Tensor], spec: AttentionSpec) -> Tensor | None:
    """All that drops keys, joined into one bool tensor broadcastable to [batch, heads, S, T]; None
    when nothing does."""
    parts: list[Tensor] = []
    if spec.mask.kind != "full":
        parts.append(spec.mask.dense(q.shape[-2], k.shape[-2], q.device))
    keep = extra(extras, spec, "keep")
    if keep is not None:
        parts.append(keep)
    padding = extra(extras, spec, "padding")
    if padding is not None:
        parts.append(padding[:, None, None, :])
    if not parts:
        return None
    joined = parts[0]
    for part in parts[1:]:
        joined = joined & part
    return joined


def extra(extras: Sequence[Tensor], spec: AttentionSpec, name: str) -> Tensor | None:
    """The extra tensor called `name`, or None."""
    return extras[spec.extras.index(name)] if name in spec.extras else None


def run(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec) -> Tensor:
    """Run the backend that the spec names."""
    backend = BACKENDS.get(spec.backend)
    if backend is None:
        raise Problem(
            "A302",
            f"unknown attention backend `{spec.backend}`",
            help=f"known backends: {', '.join(sorted(BACKENDS))}",
        )
    return backend(q, k, v, extras, spec)


def fast(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec) -> Tensor:
    """Run the backend that a rewrite has chosen, or, where none has yet, the best of torch's own:
    for what is computed on the way and neither timed nor saved."""
    backend = in_torch(spec) if spec.backend == "reference" else run
    return backend(q, k, v, extras, spec)


def _sdpa_mask(
    q: Tensor, k: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> Tensor | None:
    keep = kept(q, k, extras, spec)
    bias = extra(extras, spec, "bias")
    if keep is None:
        return bias.to(q.dtype) if bias is not None else None
    if bias is None and spec.fill == "-inf":
        return keep
    dtype = _multiplied(q)
    lowest = torch.finfo(dtype).min if spec.fill == "min" else float("-inf")
    base = torch.zeros((), dtype=dtype, device=q.device) if bias is None else bias.to(dtype)
    return torch.where(keep, base, torch.full((), lowest, dtype=dtype, device=q.device))


def _multiplied(q: Tensor) -> torch.dtype:
    """The dtype that the operator computes in: another than that of q under autocast (but for
    float64), where the lowest number of float32 would become an infinity."""
    kind = q.device.type
    if q.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return q.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype


def with_sinks(q: Tensor, k: Tensor, mask: Tensor | None, sinks: Tensor) -> Tensor:
    """The mask as logits `[batch, heads, S, T + 1]` to add, the sinks in the last column."""
    shape = (*q.shape[:3], k.shape[2])
    if mask is None:
        mask = q.new_zeros(())
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    column = sinks.to(q.dtype).expand(*shape[:3], 1)
    return torch.cat((mask.to(q.dtype).expand(shape), column), -1)


def repeated(x: Tensor, times: int) -> Tensor:
    """Key/value heads as often as query heads share them."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    from attnopt.compiler.attend_window import chunked  # it builds on this module

    return chunked(q, k, v, extras, spec)


def _column(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    from attnopt.compiler.attend_column import column

    return column(q, k, v, extras, spec)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: AttentionSpec
) -> Tensor:
    dispatched: Backend = import_module("attnopt.codegen.dispatch").attention  # it builds on this
    return dispatched(q, k, v, extras, spec)


BACKENDS: dict[str, Backend] = {
    "reference": reference, "sdpa": sdpa, "chunked": _chunked, "column": _column,
    "triton": _triton,
}  # fmt: skip
