"""`attn_implementation="attnopt"`: the runtime's attentions inside transformers' own models.

`register_hf()` puts an attention function and a mask function under that name. Windows of a prefill
run in blocks, soft caps and sink logits need no other implementation, and in decoding the query
heads of a key/value head are rows of one product, so that keys and values are read once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.compiler import attend
from attnopt.compiler.attend_step import to_all
from attnopt.compiler.attend_window import chunked, pays
from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask

NAME = "attnopt"
_WINDOW = "attnopt_window"  # the attribute by which a mask says that it is a causal window


def register_hf() -> None:
    """Make `from_pretrained(..., attn_implementation="attnopt")` known to transformers.

    Calling it again changes nothing. Raises `Problem` A214 where transformers is missing or has no
    attention interface.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise Problem(
            "A214", "transformers has no attention interface to register with", why=str(error),
            help="pip install 'attnopt[hf]'",
        ) from error  # fmt: skip
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    local_size: int | None = None,
    **more: Any,
) -> Tensor | None:
    """Transformers' mask for SDPA, bool `[batch, 1, S, T]` or None; one that is a causal window and
    nothing else is marked as such."""
    from transformers.masking_utils import sdpa_mask

    made: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, local_size=local_size, **more,
    )  # fmt: skip
    # Chunks come with a local size too: only what is the window is marked as one.
    if made is not None and local_size and not torch.compiler.is_compiling():
        band = Mask("window", left=local_size).dense(q_length, kv_length, made.device)
        if made.shape[-2:] == band.shape and bool((made == band).all()):
            setattr(made, _WINDOW, local_size)
    return made


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """One attention: query `[batch, heads, S, head_dim]`, key and value `[batch, kv_heads, T, .]`;
    answers `[batch, S, heads, v_dim]` and the weights, which are None unless asked for.

    `attention_mask` is bool or added to the logits, broadcastable to `[batch, heads, S, T]`.
    `s_aux` `[heads]` are sink logits. Dropout on the weights is honoured.
    """
    if more.get("cache") is not None:
        raise Problem("A214", "attnopt has no attention over transformers' paged cache",
                      help="use another attn_implementation for continuous batching")  # fmt: skip
    names, extras = _extras(attention_mask, position_bias, s_aux)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    single = query.shape[2] == 1
    spec = AttentionSpec(
        heads=query.shape[1], kv_heads=key.shape[1], head_dim=query.shape[3], v_dim=value.shape[3],
        scale=1.0 / math.sqrt(query.shape[3]) if scaling is None else float(scaling),
        mask=CAUSAL if attention_mask is None and causal and not single else FULL,
        softcap=softcap or 0.0, extras=tuple(names), softmax32=query.dtype.itemsize < 4,
    )  # fmt: skip
    if dropout or more.get("output_attentions"):
        weights = attend.weights(query, key, extras, spec).to(query.dtype)
        weights = F.dropout(weights, dropout, module.training)
        return _laid_out(torch.matmul(weights, attend.repeated(value, spec.group))), weights
    left = getattr(attention_mask, _WINDOW, 0)
    if left:
        window = spec.with_(mask=Mask("window", left=left), extras=())
        if len(extras) == 1 and pays(window, key.shape[2]):
            return _laid_out(chunked(query, key, value, [], window)), None
    if single:
        return _laid_out(to_all(query, key, value, extras, spec)), None
    run = attend.reference if softcap else attend.sdpa
    return _laid_out(run(query, key, value, extras, spec)), None


def _laid_out(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous()


def _extras(
    given: Tensor | None, bias: Tensor | None, sinks: Tensor | None
) -> tuple[list[str], list[Tensor]]:
    names: list[str] = []
    extras: list[Tensor] = []
    added = [x for x in (bias, given) if x is not None and x.dtype != torch.bool]
    if added:
        names, extras = ["bias"], [added[0] if len(added) == 1 else added[0] + added[1]]
    if given is not None and given.dtype == torch.bool:
        names, extras = [*names, "keep"], [*extras, given]
    if sinks is not None:
        names, extras = [*names, "sinks"], [*extras, sinks.reshape(1, -1, 1, 1)]
    return names, extras
