"""Normalisations and softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.compiler.onnx.graph import Node
from attnopt.compiler.onnx.host import Value, tensor
from attnopt.compiler.onnx.linears import OWN, SAFE_SOFTMAX
from attnopt.compiler.onnx.table import MICROSOFT, operator, refused


@operator("Softmax", reads="axis")
def softmax(node: Node, x: Value) -> Tensor:
    """A softmax along an axis."""
    return torch.softmax(tensor(x), node.get("axis", -1))


@operator(SAFE_SOFTMAX, domain=OWN, reads="axis")
def safe_softmax(node: Node, x: Value) -> Tensor:
    """A softmax along an axis; a row without any finite logit gives zeros."""
    made: Tensor = torch.ops.aten._safe_softmax(tensor(x), node.get("axis", -1))
    return made


@operator("LogSoftmax", reads="axis")
def log_softmax(node: Node, x: Value) -> Tensor:
    """The logarithm of a softmax along an axis."""
    return torch.log_softmax(tensor(x), node.get("axis", -1))


@operator("LayerNormalization", reads="axis epsilon", only={"stash_type": 1})
def layer_norm(node: Node, x: Value, scale: Value, bias: Value = None) -> Tensor:
    """Mean 0 and variance 1 over the dims from `axis` on, then scaled and shifted."""
    if node.has(1) or node.has(2):
        raise refused(node, "its mean and deviation are read")
    made = tensor(x)
    axis = node.get("axis", -1)
    return _layer_norm(made, tensor(scale), bias, node.get("epsilon", 1e-5), axis)


def _layer_norm(x: Tensor, scale: Tensor, bias: Value, epsilon: float, axis: int) -> Tensor:
    shape = list(x.shape[axis if axis < 0 else axis - x.dim() :])
    shift = None if bias is None else tensor(bias)
    if list(scale.shape) == shape and (shift is None or list(shift.shape) == shape):
        return F.layer_norm(x, shape, scale, shift, epsilon)
    made = F.layer_norm(x, shape, None, None, epsilon) * scale
    return made if shift is None else made + shift


@operator(
    "RMSNormalization", "SimplifiedLayerNormalization", reads="axis epsilon", only={"stash_type": 1}
)
def rms_norm(node: Node, x: Value, scale: Value) -> Tensor:
    """Root mean square 1 over the dims from `axis` on, then scaled; computed in float32."""
    if node.has(1):
        raise refused(node, "its deviation is read")
    return _rms_norm(tensor(x), tensor(scale), node.get("epsilon", 1e-5), node.get("axis", -1))


def _rms_norm(x: Tensor, scale: Tensor, epsilon: float, axis: int) -> Tensor:
    first = axis if axis < 0 else axis - x.dim()
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    square = (wide * wide).mean(list(range(first, 0)), keepdim=True)
    return (wide * torch.rsqrt(square + epsilon)).to(x.dtype) * scale


@operator("SkipLayerNormalization", domain=MICROSOFT, reads="epsilon")
def skip_layer_norm(
    node: Node, x: Value, skip: Value, gamma: Value, beta: Value = None, bias: Value = None
) -> tuple[Tensor, None, None, Tensor]:
    """The layer norm of a residual sum; the sum is the fourth output."""
    total = _skipped(node, x, skip, bias)
    made = _layer_norm(total, tensor(gamma), beta, node.get("epsilon", 1e-12), -1)
    return made, None, None, total


@operator("SkipSimplifiedLayerNormalization", domain=MICROSOFT, reads="epsilon")
def skip_rms_norm(
    node: Node, x: Value, skip: Value, gamma: Value, bias: Value = None
) -> tuple[Tensor, None, None, Tensor]:
    """The RMS norm of a residual sum; the sum is the fourth output."""
    total = _skipped(node, x, skip, bias)
    return _rms_norm(total, tensor(gamma), node.get("epsilon", 1e-12), -1), None, None, total


def _skipped(node: Node, x: Value, skip: Value, bias: Value) -> Tensor:
    if node.has(1) or node.has(2):
        raise refused(node, "its mean and deviation are read")
    branch = tensor(x)
    branch = branch if bias is None else branch + tensor(bias)
    return branch + tensor(skip)


@operator("EmbedLayerNormalization", domain=MICROSOFT, reads="epsilon mask_index_type")
def embed_layer_norm(
    node: Node, words: Value, segments: Value, word: Value, position: Value,
    segment: Value, gamma: Value, beta: Value, mask: Value = None, positions: Value = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Word, position and segment embeddings, added and normalised.

    The second output counts the real tokens of each row, the third is the sum.
    """
    ids = tensor(words).long()
    where = torch.arange(ids.shape[1])[None] if positions is None else tensor(positions).long()
    total = F.embedding(ids, tensor(word)) + F.embedding(where, tensor(position))
    if segments is not None and segment is not None:
        total = total + F.embedding(tensor(segments).long(), tensor(segment))
    made = _layer_norm(total, tensor(gamma), beta, node.get("epsilon", 1e-12), -1)
    count = None if mask is None else tensor(mask).sum(1).to(torch.int32)
    if mask is None and node.has(1) and node.outputs[1]:
        count = torch.zeros_like(ids[:, 0], dtype=torch.int32)
    return made, count, total


@operator("BatchNormalization", reads="epsilon momentum training_mode")
def batch_norm(
    node: Node, x: Value, scale: Value, bias: Value, mean: Value, variance: Value
) -> Tensor:
    """Normalised by stored means and variances, channel by channel."""
    if node.get("training_mode", 0):
        raise refused(node, "it is in training mode")
    return F.batch_norm(
        tensor(x), tensor(mean), tensor(variance), tensor(scale), tensor(bias),
        eps=node.get("epsilon", 1e-5),
    )  # fmt: skip


@operator("InstanceNormalization", reads="epsilon")
def instance_norm(node: Node, x: Value, scale: Value, bias: Value) -> Tensor:
    """Each channel of each row normalised over the rest."""
    made, epsilon = tensor(x), node.get("epsilon", 1e-5)
    return F.instance_norm(made, weight=tensor(scale), bias=tensor(bias), eps=epsilon)


@operator("GroupNormalization", reads="epsilon num_groups", only={"stash_type": 1})
def group_norm(node: Node, x: Value, scale: Value, bias: Value) -> Tensor:
    """Groups of channels normalised together; before opset 21 scaled group by group."""
    made, groups = tensor(x), node.get("num_groups")
    weight, shift = tensor(scale), tensor(bias)
    if node.opset < 21:
        each = made.shape[1] // groups
        weight, shift = weight.repeat_interleave(each), shift.repeat_interleave(each)
    return F.group_norm(made, groups, weight, shift, node.get("epsilon", 1e-5))


@operator("LpNormalization", reads="axis p")
def lp_norm(node: Node, x: Value) -> Tensor:
    """Length 1 along an axis."""
    made, axis = tensor(x), node.get("axis", -1)
    length: Tensor = torch.linalg.vector_norm(made, node.get("p", 2), axis, keepdim=True)
    return made / length
