"""Matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.compiler.onnx.graph import Node
from attnopt.compiler.onnx.host import Value, tensor
from attnopt.compiler.onnx.linears import LINEAR, OWN
from attnopt.compiler.onnx.table import MICROSOFT, operator, refused


@operator("MatMul")
def matmul(node: Node, a: Value, b: Value) -> Tensor:
    """A product over the last dim of `a` and the last but one of `b`."""
    return torch.matmul(tensor(a), tensor(b))


@operator(LINEAR, domain=OWN, reads="alpha beta transA transB")
def linear(node: Node, x: Value, weight: Value, bias: Value = None) -> Tensor:
    """x [.., in] times a constant [out, in], plus a constant [out]."""
    return F.linear(tensor(x), tensor(weight), None if bias is None else tensor(bias))


@operator("Gemm", reads="alpha beta transA transB")
def gemm(node: Node, a: Value, b: Value, c: Value = None) -> Tensor:
    """alpha a b + beta c, each of a and b transposed where asked for."""
    left, right = tensor(a), tensor(b)
    left = left.t() if node.get("transA", 0) else left
    right = right.t() if node.get("transB", 0) else right
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    made = torch.matmul(left, right)
    made = made if alpha == 1.0 else made * alpha
    if c is None:
        return made
    added = tensor(c)
    return made + (added if beta == 1.0 else added * beta)


@operator("FusedMatMul", domain=MICROSOFT, reads="alpha transA transB transBatchA transBatchB")
def fused_matmul(node: Node, a: Value, b: Value) -> Tensor:
    """alpha a b, the last two dims of each transposed where asked for."""
    left, right = tensor(a), tensor(b)
    if node.get("transBatchA", 0) or node.get("transBatchB", 0):
        raise refused(node, "batches are transposed")
    left = left.transpose(-1, -2) if node.get("transA", 0) else left
    right = right.transpose(-1, -2) if node.get("transB", 0) else right
    made = torch.matmul(left, right)
    alpha = node.get("alpha", 1.0)
    return made if alpha == 1.0 else made * alpha


@operator("Einsum", reads="equation")
def einsum(node: Node, *values: Value) -> Tensor:
    """A sum of products by an equation."""
    equation = node.get("equation")
    text = equation.decode() if isinstance(equation, bytes) else str(equation)
    return torch.einsum(text.replace(" ", ""), *(tensor(value) for value in values))
