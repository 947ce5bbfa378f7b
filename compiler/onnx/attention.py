"""The standard `Attention` and `RotaryEmbedding` operators (opset 23 and 24), and what all fused
attentions share.

They become torch's `scaled_dot_product_attention` where it has what they ask for, and the products
written out where it has not, so that raising finds them like any other attention.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.compiler.onnx.graph import Node
from attnopt.compiler.onnx.host import Value, tensor
from attnopt.compiler.onnx.table import operator, refused


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool = False, window: int = 0,
    keep: Tensor | None = None, bias: Tensor | None = None, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(softcap(scale q k^T) + bias) v over the keys that are read.

    q `[batch, heads, S, d]`, k and v `[batch, kv_heads, T, ...]`; `keep` (bool, True for a key that
    is read) and `bias` broadcast to `[batch, heads, S, T]`; `window` is how many keys up to its own
    a query reads, 0 for all; `sinks` [heads] is one more logit of each row, of no key.
    """
    number = scale or 1.0 / math.sqrt(q.shape[-1])
    plain = not softcap and sinks is None
    if plain and causal and not window and keep is None and bias is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=number, enable_gqa=q.shape[1] != k.shape[1]
        )
    kept = _kept(q, k, causal, window, keep)
    if plain:
        mask = kept
        if bias is not None:
            mask = bias if kept is None else bias.masked_fill(~kept, float("-inf"))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=number, enable_gqa=q.shape[1] != k.shape[1]
        )
    group = q.shape[1] // k.shape[1]
    scores = torch.matmul(q, _repeated(k, group).transpose(-1, -2)) * number
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if kept is not None:
        scores = scores.masked_fill(~kept, float("-inf"))
    if sinks is None:
        return torch.matmul(torch.softmax(scores, -1), _repeated(v, group))
    column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], q.shape[1], q.shape[2], 1)
    weights = torch.softmax(torch.cat((scores, column.to(scores.dtype)), -1), -1)[..., :-1]
    return torch.matmul(weights, _repeated(v, group))


def _kept(
    q: Tensor, k: Tensor, causal: bool, window: int, keep: Tensor | None
) -> Tensor | None:  # fmt: skip
    parts = [] if keep is None else [keep]
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    if causal:
        parts.append(j <= i)
    if window:
        parts.append(i - j < window)
    return reduce(torch.logical_and, parts) if parts else None


def _repeated(x: Tensor, times: int) -> Tensor:
    if times == 1:
        return x
    batch, heads, length, dim = x.shape
    wide = x[:, :, None].expand(batch, heads, times, length, dim)
    return wide.reshape(batch, heads * times, length, dim)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, seq, heads * dim] as [batch, heads, seq, dim]."""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[batch, heads, seq, dim] as [batch, seq, heads * dim]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


@operator(
    "Attention",
    reads="is_causal kv_num_heads q_num_heads "
    "qk_matmul_output_mode scale softcap softmax_precision",
)
def attention(
    node: Node, q: Value, k: Value, v: Value, mask: Value = None, past_key: Value = None,
    past_value: Value = None, lengths: Value = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The standard operator, without a cache; inputs of rank 3 or 4."""
    if past_key is not None or past_value is not None or lengths is not None:
        raise refused(node, "it reads a key/value cache")
    if node.has(3):
        raise refused(node, "its scores are an output of the graph")
    query, key, value = tensor(q), tensor(k), tensor(v)
    flat = query.dim() == 3
    if flat:
        query = split_heads(query, node.get("q_num_heads"))
        key, value = (split_heads(x, node.get("kv_num_heads")) for x in (key, value))
    keep = bias = None
    if mask is not None:
        given = tensor(mask)
        keep, bias = (given, None) if given.dtype == torch.bool else (None, given)
    made = attend(
        query, key, value, scale=node.get("scale"), causal=bool(node.get("is_causal", 0)),
        keep=keep, bias=bias, softcap=node.get("softcap", 0.0),
    )  # fmt: skip
    return (join_heads(made) if flat else made), key, value


@operator("RotaryEmbedding", reads="interleaved num_heads rotary_embedding_dim")
def rotary(
    node: Node, x: Value, cos: Value, sin: Value, positions: Value = None
) -> Tensor:  # fmt: skip
    """Rotary positions; inputs of rank 3 or 4."""
    made, heads = tensor(x), node.get("num_heads", 0)
    tables = [tensor(cos), tensor(sin)]
    if positions is not None:
        tables = [F.embedding(tensor(positions), table) for table in tables]
    flat = made.dim() == 3
    split = split_heads(made, heads) if flat else made
    width = node.get("rotary_embedding_dim", 0)
    turned = rotate(split, *tables, interleaved=bool(node.get("interleaved", 0)), width=width)
    return join_heads(turned) if flat else turned


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, width: int = 0
) -> Tensor:  # fmt: skip
    """Rotate pairs of channels of x `[batch, heads, seq, dim]` by tables `[batch, seq, pairs]`.

    The pairs are halves of the first `width` channels (0: of all), or neighbours (`interleaved`).
    """
    width = width or x.shape[-1]
    turned, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    cos, sin = cos[..., : width // 2].unsqueeze(1), sin[..., : width // 2].unsqueeze(1)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        made = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned[..., : width // 2], turned[..., width // 2 :]
        made = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return made if rest is None else torch.cat((made, rest), -1)
