"""An attention spec as the standard ONNX operator `Attention` (opset 23 and newer).

The operator has grouped heads, a scale, a soft cap, a causal flag and one mask, added to or
dropping from the logits after the cap: softmax(softcap(scale q k^T) + mask) v. Windows, padding and
biases are its mask; sinks are one more key and value of zeros whose mask is the sink.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.compiler import attend
from attnopt.compiler.spec import AttentionSpec

_FLOAT = 1  # ONNX's number for float32


def expressed(spec: AttentionSpec) -> Callable[..., Tensor]:
    """The spec as a function of q, k, v and its extras that calls the operator once.

    Shapes are those of `attnopt.compiler.spec`.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, *extras: Tensor) -> Tensor:
        flag = spec.mask.kind == "causal" and not spec.extras
        mask = None if flag else _mask(q, k, extras, spec)
        sinks = attend.extra(extras, spec, "sinks")
        if sinks is not None:
            mask = attend.with_sinks(q, k, mask, sinks)
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        wide = spec.softmax32 and q.dtype != torch.float32
        out: Tensor = torch.onnx.ops.attention(
            q, k, v, mask, is_causal=flag, scale=spec.scale, softcap=spec.softcap,
            softmax_precision=_FLOAT if wide else None,
        )[0]  # fmt: skip
        return out

    return attention


def _mask(
    q: Tensor, k: Tensor, extras: tuple[Tensor, ...], spec: AttentionSpec
) -> Tensor | None:  # fmt: skip
    """Everything that drops or adds, as one tensor of four dims: bool, or in q's dtype."""
    keep, bias = attend.kept(q, k, extras, spec), attend.extra(extras, spec, "bias")
    if keep is None:
        return None if bias is None else _four(bias.to(q.dtype))
    if bias is None and spec.fill == "-inf":
        return _four(keep)
    # ONNX Runtime takes the very lowest number for -inf; half of it absorbs any score as well.
    lowest = torch.finfo(q.dtype).min / 2 if spec.fill == "min" else float("-inf")
    base = torch.zeros((), dtype=q.dtype) if bias is None else bias.to(q.dtype)
    return _four(torch.where(keep, base, lowest))


def _four(mask: Tensor) -> Tensor:
    return mask[(None,) * (4 - mask.dim())]
