"""Element-wise operators of ONNX Runtime (domain com.microsoft), and its rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.compiler.onnx.attention import join_heads, rotate, split_heads
from attnopt.compiler.onnx.graph import Node
from attnopt.compiler.onnx.host import Value, tensor
from attnopt.compiler.onnx.table import MICROSOFT, operator, refused


@operator("Gelu", domain=MICROSOFT)
def gelu(node: Node, x: Value) -> Tensor:
    """GELU."""
    return F.gelu(tensor(x))


@operator("BiasGelu", domain=MICROSOFT)
def bias_gelu(node: Node, x: Value, bias: Value) -> Tensor:
    """GELU of a sum."""
    return F.gelu(tensor(x) + tensor(bias))


@operator("FastGelu", domain=MICROSOFT)
def fast_gelu(node: Node, x: Value, bias: Value = None) -> Tensor:
    """GELU by tanh, of a sum where there is a bias."""
    made = tensor(x) if bias is None else tensor(x) + tensor(bias)
    return F.gelu(made, approximate="tanh")


@operator("QuickGelu", domain=MICROSOFT, reads="alpha")
def quick_gelu(node: Node, x: Value) -> Tensor:
    """x sigmoid(alpha x)."""
    made, alpha = tensor(x), node.get("alpha", 1.702)
    return F.silu(made) if alpha == 1.0 else made * torch.sigmoid(made * alpha)


@operator(
    "RotaryEmbedding",
    domain=MICROSOFT,
    reads="interleaved is_packed_batching num_heads rotary_embedding_dim",
    only={"scale": 1.0},
)
def rotary(node: Node, x: Value, positions: Value, cos: Value, sin: Value) -> Tensor:
    """Rotary positions, of a given place or counted from a first one."""
    if node.get("is_packed_batching", 0):
        raise refused(node, "its rows are packed")
    made, where = tensor(x), tensor(positions).long()
    flat = made.dim() == 3
    width = node.get("rotary_embedding_dim", 0)
    tables = [tensor(cos), tensor(sin)]
    heads = node.get("num_heads", 0) or (made.shape[-1] // (2 * tables[0].shape[-1]))
    split = split_heads(made, heads) if flat else made
    if where.dim() == 1:
        where = where[:, None] + torch.arange(split.shape[2])[None]
    tables = [F.embedding(where, table) for table in tables]
    turned = rotate(split, *tables, interleaved=bool(node.get("interleaved", 0)), width=width)
    return join_heads(turned) if flat else turned
