"""Halves that change places as flips: the same numbers, and in no other graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.compiler.decode.halves import flipped

aten = torch.ops.aten


def graph(run: Callable[[Tensor], Tensor], x: Tensor) -> fx.GraphModule:
    return make_fx(run)(x)


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (7, 32), (96,)])
def test_the_same_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    module = flipped(graph(lambda x: x * 2 + turned(x), x))
    assert not module.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert not module.graph.find_nodes(op="call_function", target=aten.neg.default)
    made = module(x)
    assert made.dtype == dtype and torch.equal(made, x * 2 + turned(x))


def test_what_is_read_elsewhere_stays() -> None:
    def run(x: Tensor) -> Tensor:
        left, less = x[..., :16], -x[..., 16:]
        return torch.cat((less, left), -1).sum() + left.sum() * less.prod()

    x = torch.randn(3, 32)
    module = flipped(graph(run, x))
    assert not module.graph.find_nodes(op="call_function", target=aten.cat.default)
    torch.testing.assert_close(module(x), run(x))


@pytest.mark.parametrize(("run", "width"), [
    (turned, 24),  # halves that fill no register
    (lambda x: torch.cat((x[..., 16:], x[..., :16]), -1), 32),  # no sign
    (lambda x: torch.cat((-x[..., :16], x[..., 16:]), -1), 32),  # in their places
    (lambda x: torch.cat((-x[..., 16:], x[..., :16]), 0), 32),  # along another axis
    (lambda x: torch.cat((-x[..., 16:], x[..., :16], x), -1), 32),  # and more
    (lambda x: torch.cat((-x[..., 32:], x[..., :16]), -1), 48),  # not all of it
    (lambda x: torch.cat((-x[..., 16:], (2 * x)[..., :16]), -1), 32),  # of two sources
    (lambda x: torch.cat((-x[..., 1::2], x[..., ::2]), -1), 32),  # turns about
])  # fmt: skip
def test_other_joins_stay(run: Callable[[Tensor], Tensor], width: int) -> None:
    x = torch.randn(3, width)
    module = flipped(graph(run, x))
    assert module.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert torch.equal(module(x), run(x))


def test_what_writes_is_kept() -> None:
    """A step fills its caches by nodes that nobody reads."""

    class Writes(nn.Module):
        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            cache.copy_(turned(x))
            return x + 1

    x = torch.randn(3, 32)
    module = flipped(make_fx(Writes())(x, torch.zeros(3, 32)))
    cache = torch.zeros(3, 32)
    module(x, cache)
    assert torch.equal(cache, turned(x))
