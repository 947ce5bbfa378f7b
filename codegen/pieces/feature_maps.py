"""Feature maps of linear attention and their derivatives.

A map is a `@triton.jit` function `map(x, there)` from a float32 tile [rows, channels] to as many
features; `there` [1, channels] is false at padded channels, and what is returned there is thrown
away. Its derivative `slope(x, features, gradient)` turns the gradient of the features, zero at
padded channels, into that of x. To add a map, write both and name them in `feature_map`.

A two-sided map has the features of x and of -x (Hedgehog, Zhang et al. 2024, with the softmax). In
a tile they alternate, channel by channel; in memory those of x come first.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from attnopt.codegen.pieces.online_softmax import LOG2E


@triton.jit
def elu_plus_one(x, there):
    """elu(x) + 1 (Katharopoulos et al. 2020)."""
    return tl.where(x > 0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2E))


@triton.jit
def elu_plus_one_slope(x, features, gradient):
    return gradient * tl.minimum(features, 1.0)


@triton.jit
def relu(x, there):
    return tl.maximum(x, 0.0)


@triton.jit
def relu_slope(x, features, gradient):
    return tl.where(x > 0, gradient, 0.0)


@triton.jit
def softmax(x, there):
    """The softmax over the channels of a row."""
    x = tl.where(there, x, float("-inf")) * LOG2E
    x = tl.exp2(x - tl.max(x, 1)[:, None])
    return x / tl.sum(x, 1)[:, None]


@triton.jit
def softmax_slope(x, features, gradient):
    return features * (gradient - tl.sum(features * gradient, 1)[:, None])


def feature_map(name: str) -> tuple[Any, Any]:
    """The map of a name and its derivative; (None, None) for "identity"."""
    if name == "elu":
        return elu_plus_one, elu_plus_one_slope
    if name == "relu":
        return relu, relu_slope
    if name == "softmax":
        return softmax, softmax_slope
    return None, None


@triton.jit
def mapped(x, there, MAP: tl.constexpr, SIDES: tl.constexpr):
    """The features [rows, SIDES * channels] of a tile [rows, channels], in its dtype, zero at
    padded channels; MAP None leaves the tile as it is."""
    if MAP is None:
        return x
    else:
        wide = x.to(tl.float32)
        features = tl.where(there, MAP(wide, there), 0.0)
        if SIDES == 2:
            other = tl.where(there, MAP(-wide, there), 0.0)
            features = tl.join(features, other)
            features = tl.reshape(features, [x.shape[0], 2 * x.shape[1]])
        return features.to(x.dtype)


@triton.jit
def feature_place(index, CHANNELS: tl.constexpr, SIDES: tl.constexpr):
    """Where the features of a tile stand in memory, and which of them there are."""
    if SIDES == 2:
        return index % 2 * CHANNELS + index // 2, index // 2 < CHANNELS
    else:
        return index, index < CHANNELS
