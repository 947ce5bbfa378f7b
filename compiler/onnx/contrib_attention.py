"""The fused attentions of ONNX Runtime (domain com.microsoft): `Attention`, `MultiHeadAttention`
and `GroupQueryAttention`, each over a whole sequence; a key/value cache is refused.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.compiler.onnx.attention import attend, join_heads, rotate, split_heads
from attnopt.compiler.onnx.graph import Node
from attnopt.compiler.onnx.host import Value, tensor
from attnopt.compiler.onnx.table import MICROSOFT, operator, refused

_FILLER = -10000.0  # what these operators add to the logits of keys that are not read


@operator(
    "Attention",
    domain=MICROSOFT,
    reads="do_rotary mask_filter_value num_heads past_present_share_buffer "
    "qkv_hidden_sizes rotary_embedding_dim scale unidirectional",
)
def attention(
    node: Node, x: Value, weights: Value, bias: Value = None, mask: Value = None,
    past: Value = None, added: Value = None, past_length: Value = None,
) -> Tensor:  # fmt: skip
    """Projections of one input by a packed matrix [in, q + k + v], then attention."""
    if past is not None or past_length is not None or node.has(1):
        raise refused(node, "it keeps a key/value cache")
    if node.get("do_rotary", 0):
        raise refused(node, "it rotates by positions of its own")
    source, matrix = tensor(x), tensor(weights)
    widths = node.get("qkv_hidden_sizes") or [matrix.shape[1] // 3] * 3
    shifts = [None] * 3 if bias is None else list(torch.split(tensor(bias), widths))
    parts = [
        F.linear(source, part.t(), shift)
        for part, shift in zip(torch.split(matrix, widths, 1), shifts, strict=True)
    ]
    q, k, v = (split_heads(part, node.get("num_heads")) for part in parts)
    return _attended(node, q, k, v, mask, added)


@operator(
    "MultiHeadAttention", domain=MICROSOFT, reads="mask_filter_value num_heads scale unidirectional"
)
def multi_head_attention(
    node: Node, query: Value, key: Value = None, value: Value = None, bias: Value = None,
    mask: Value = None, added: Value = None, past_key: Value = None, past_value: Value = None,
    past_length: Value = None, indirection: Value = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention of projected q, k and v, which may be packed in one or two tensors."""
    if any(x is not None for x in (past_key, past_value, past_length, indirection)):
        raise refused(node, "it reads a key/value cache")
    heads, q = node.get("num_heads"), tensor(query)
    if q.dim() == 5:  # [batch, seq, heads, 3, dim]
        q, k, v = (part.transpose(1, 2) for part in q.unbind(3))
    else:
        q = split_heads(q, heads)
        first = tensor(key)
        if first.dim() == 5:  # [batch, seq, heads, 2, dim]
            k, v = (part.transpose(1, 2) for part in first.unbind(3))
        else:
            k, v = (x if x.dim() == 4 else split_heads(x, heads) for x in (first, tensor(value)))
    if bias is not None:
        widths = [heads * part.shape[-1] for part in (q, k, v)]
        shifts = torch.split(tensor(bias), widths)
        q, k, v = (
            part + shift.reshape(1, heads, 1, part.shape[-1])
            for part, shift in zip((q, k, v), shifts, strict=True)
        )
    return _attended(node, q, k, v, mask, added), k, v


def _attended(
    node: Node, q: Tensor, k: Tensor, v: Tensor, mask: Value, added: Value
) -> Tensor:  # fmt: skip
    bias = None if added is None else tensor(added)
    if mask is not None:
        padding = _padding(node, tensor(mask), k)
        bias = padding.to(q.dtype) if bias is None else bias + padding.to(q.dtype)
    made = attend(
        q, k, v, scale=node.get("scale"), causal=bool(node.get("unidirectional", 0)), bias=bias
    )
    return join_heads(made)


def _padding(node: Node, mask: Tensor, k: Tensor) -> Tensor:
    """What is added to the logits, from a mask [batch, T], [batch, S, T] or lengths [batch]."""
    filler = node.get("mask_filter_value", _FILLER)
    if mask.dim() == 1:
        if mask.shape[0] != k.shape[0]:
            raise refused(node, "its mask gives the start and the end of each row")
        mask = torch.arange(k.shape[2])[None] < mask[:, None]
    else:
        mask = mask > 0 if mask.dtype != torch.bool else mask
    if mask.dim() not in (2, 3):
        raise refused(node, f"a mask of {mask.dim()} dims")
    wide = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
    return torch.where(wide, 0.0, filler)


@operator(
    "GroupQueryAttention",
    domain=MICROSOFT,
    reads="do_rotary kv_num_heads local_window_size num_heads "
    "rotary_interleaved scale smooth_softmax softcap",
    only={"qk_output": 0, "k_quant_type": "NONE", "v_quant_type": "NONE"},
)
def group_query_attention(
    node: Node, query: Value, key: Value, value: Value, past_key: Value = None,
    past_value: Value = None, seqlens: Value = None, total: Value = None, cos: Value = None,
    sin: Value = None, positions: Value = None, added: Value = None, sinks: Value = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Causal attention of grouped heads over a prompt, positions rotated where asked for.

    `seqlens` marks padding at the ends of rows; real tokens do not read what comes after them, and
    what the operator gives at padding is not specified, so it is not read.
    """
    if past_key is not None or past_value is not None:
        raise refused(node, "it reads a key/value cache")
    if node.get("smooth_softmax", 0):
        raise refused(node, "its softmax has a constant sink")
    heads, shared, q = node.get("num_heads"), node.get("kv_num_heads"), tensor(query)
    if key is None:
        each = q.shape[2] // (heads + 2 * shared)
        q, k, v = torch.split(q, [heads * each, shared * each, shared * each], 2)
    else:
        k, v = tensor(key), tensor(value)
    q, k, v = split_heads(q, heads), split_heads(k, shared), split_heads(v, shared)
    if node.get("do_rotary", 0):
        where = torch.arange(q.shape[2])[None] if positions is None else tensor(positions).long()
        tables = [F.embedding(where, tensor(table)) for table in (cos, sin)]
        turn = bool(node.get("rotary_interleaved", 0))
        width = 2 * tables[0].shape[-1]
        q, k = (rotate(x, *tables, interleaved=turn, width=width) for x in (q, k))
    made = attend(
        q, k, v, scale=node.get("scale"), causal=True,
        window=max(0, node.get("local_window_size", -1)), softcap=node.get("softcap", 0.0),
        bias=None if added is None else tensor(added),
        sinks=None if sinks is None else tensor(sinks),
    )  # fmt: skip
    return join_heads(made), k, v
