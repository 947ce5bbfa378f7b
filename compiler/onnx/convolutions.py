"""Convolutions, pooling and resizing of images."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnopt.compiler.onnx.graph import Node
from attnopt.compiler.onnx.host import Value, sizes, tensor
from attnopt.compiler.onnx.table import operator, refused

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_BACK = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@operator("Conv", reads="auto_pad dilations group kernel_shape pads strides")
def conv(node: Node, x: Value, weight: Value, bias: Value = None) -> Tensor:
    """A convolution over one to three dims."""
    made, kernel = tensor(x), tensor(weight)
    rank = kernel.dim() - 2
    made, padding = _padded(node, made, rank, list(kernel.shape[2:]))
    return _CONV[rank](
        made, kernel, None if bias is None else tensor(bias),
        stride=_each(node, "strides", rank), padding=padding,
        dilation=_each(node, "dilations", rank), groups=node.get("group", 1),
    )  # fmt: skip


@operator(
    "ConvTranspose",
    reads="auto_pad dilations group kernel_shape output_padding output_shape pads strides",
)
def conv_transpose(node: Node, x: Value, weight: Value, bias: Value = None) -> Tensor:
    """The gradient of a convolution, as an operator."""
    kernel = tensor(weight)
    rank = kernel.dim() - 2
    pads = node.get("pads", [0] * (2 * rank))
    if pads[:rank] != pads[rank:] or node.get("output_shape") or _mode(node) not in _PLAIN:
        raise refused(node, "its padding differs from side to side, or its shape is given")
    return _BACK[rank](
        tensor(x), kernel, None if bias is None else tensor(bias),
        stride=_each(node, "strides", rank), padding=pads[:rank],
        output_padding=node.get("output_padding", [0] * rank), groups=node.get("group", 1),
        dilation=_each(node, "dilations", rank),
    )  # fmt: skip


@operator("MaxPool", reads="auto_pad ceil_mode dilations kernel_shape pads storage_order strides")
def max_pool(node: Node, x: Value) -> Tensor:
    """The greatest element of each window."""
    kernel = node.get("kernel_shape")
    rank = len(kernel)
    if node.has(1):
        raise refused(node, "its indices are read")
    made, padding = _padded(node, tensor(x), rank, kernel, filler=float("-inf"))
    return _MAX[rank](
        made, kernel, _each(node, "strides", rank), padding, _each(node, "dilations", rank),
        bool(node.get("ceil_mode", 0)),
    )  # fmt: skip


@operator(
    "AveragePool", reads="auto_pad ceil_mode count_include_pad dilations kernel_shape pads strides"
)
def average_pool(node: Node, x: Value) -> Tensor:
    """The mean of each window."""
    kernel = node.get("kernel_shape")
    rank = len(kernel)
    pads = node.get("pads", [0] * (2 * rank))
    if pads[:rank] != pads[rank:] or _mode(node) not in _PLAIN or node.get("dilations"):
        raise refused(node, "its padding differs from side to side, or it is dilated")
    pool: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[rank]
    made: Tensor = pool(
        tensor(x), kernel, _each(node, "strides", rank), pads[:rank],
        bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0)),
    )  # fmt: skip
    return made


@operator("GlobalAveragePool")
def global_average_pool(node: Node, x: Value) -> Tensor:
    """The mean over all dims after the channels."""
    made = tensor(x)
    return made.mean(list(range(2, made.dim())), keepdim=True)


@operator(
    "Resize",
    reads="antialias axes coordinate_transformation_mode "
    "cubic_coeff_a extrapolation_value mode nearest_mode",
    only={"exclude_outside": 0, "keep_aspect_ratio_policy": "stretch"},
)
def resize(
    node: Node, x: Value, roi: Value = None, scales: Value = None, wanted: Value = None
) -> Tensor:
    """An image of another size, by the modes that torch has too."""
    made = tensor(x)
    mode = _text(node.get("mode", "nearest"))
    place = _text(node.get("coordinate_transformation_mode", "half_pixel"))
    places = ("half_pixel", "pytorch_half_pixel", "align_corners")
    known = {(kind, one) for kind in ("linear", "cubic") for one in places}
    known.add(("nearest", "asymmetric"))
    floor = _text(node.get("nearest_mode", "round_prefer_floor")) == "floor"
    flat = made.dim() == 4 and (mode, place) in known and (mode != "nearest" or floor)
    if mode == "cubic" and node.get("cubic_coeff_a", -0.75) != -0.75:
        flat = False
    if not flat or node.get("antialias", 0) or node.get("axes"):
        raise refused(node, f"a resize by {mode} with {place} of {made.dim()} dims")
    by: list[float] | None = None
    if wanted is not None and 0 not in wanted.shape:
        target = sizes(wanted, "the sizes of a Resize")
        whole = all(size == old for size, old in zip(target[:2], made.shape[:2], strict=True))
    elif scales is not None and 0 not in scales.shape:
        by = [float(s) for s in sizes(scales, "the scales of a Resize")]
        both = zip(made.shape, by, strict=True)
        target = [int(old * scale) if isinstance(old, int) else old for old, scale in both]
        whole = by[:2] == [1.0, 1.0]
    else:
        raise refused(node, "neither sizes nor scales are given")
    if not whole:
        raise refused(node, "it resizes the batch or the channels")
    # Where one element comes out, this mode reads the first; torch reads the middle.
    ones = any(isinstance(size, int) and size == 1 for size in target[2:])
    if place == "pytorch_half_pixel" and mode != "nearest" and ones:
        raise refused(node, f"a resize with {place} to the size 1")
    words = {"linear": "bilinear", "cubic": "bicubic", "nearest": "nearest"}
    corners = None if mode == "nearest" else place == "align_corners"
    if by is not None:  # positions go by the scale, not by the quotient of the sizes
        return F.interpolate(made, scale_factor=by[2:], mode=words[mode], align_corners=corners)
    return F.interpolate(made, size=target[2:], mode=words[mode], align_corners=corners)


_PLAIN = ("NOTSET", "VALID")


def _padded(
    node: Node, x: Tensor, rank: int, kernel: list[int], filler: float = 0.0
) -> tuple[Tensor, list[int]]:
    """The input, padded where the two sides differ, and the padding that is left to do."""
    mode = _mode(node)
    if mode not in (*_PLAIN, "SAME_UPPER", "SAME_LOWER"):
        raise refused(node, f"the padding {mode} is not known")
    if mode.startswith("SAME"):
        pads = _same(node, x, rank, kernel, upper=mode == "SAME_UPPER")
    else:
        pads = node.get("pads", [0] * (2 * rank)) if mode == "NOTSET" else [0] * (2 * rank)
    if pads[:rank] == pads[rank:]:
        return x, list(pads[:rank])
    flat = [p for dim in reversed(range(rank)) for p in (pads[dim], pads[dim + rank])]
    return F.pad(x, flat, value=filler), [0] * rank


def _same(node: Node, x: Tensor, rank: int, kernel: list[int], upper: bool) -> list[int]:
    """The padding with which the output has the input's size over the stride."""
    strides, dilations = _each(node, "strides", rank), _each(node, "dilations", rank)
    ends: list[tuple[int, int]] = []
    for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        ends.append((small, large) if upper else (large, small))
    return [a for a, _ in ends] + [b for _, b in ends]


def _each(node: Node, name: str, rank: int) -> list[int]:
    return list(node.get(name) or [1] * rank)


def _mode(node: Node) -> str:
    return _text(node.get("auto_pad", "NOTSET"))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
