"""What a compiled graph takes for granted, as far as it can be told ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from attnopt.compiler.decode.conditions import Conditions


def _conditions(f: Callable[..., Tensor], x: Tensor, *numbers: int) -> tuple[Conditions, list[Any]]:
    """The conditions of a compiled function, and what its graph is called with."""
    found = list[Any]()

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        conditions = Conditions(inputs)

        def run(*args: Any) -> Any:
            found[:] = [conditions, list(args)]
            return graph(*args)

        return run

    torch._dynamo.reset()
    torch.compile(f, backend=backend, dynamic=True, fullgraph=True)(x, *numbers)
    torch._dynamo.reset()
    conditions, args = found
    return conditions, args


def _at(args: list[Any], number: int) -> int:
    return next(at for at, x in enumerate(args) if isinstance(x, int) and x == number)


def branching(x: Tensor, n: int) -> Tensor:
    return x[:n] * 2 if 2 * n < 40 else x[:n] * 3


def test_a_branch_on_the_position_ends_what_holds() -> None:
    conditions, args = _conditions(branching, torch.ones(50), 7)
    moving = {_at(args, 7): 0}
    assert conditions.hold(args, moving, range(7, 20))
    assert not conditions.hold(args, moving, range(7, 21))
    assert not conditions.hold(args, moving, range(0))
    assert conditions.hold(args, {_at(args, 7): 3}, range(4, 17))  # three ahead of the position
    assert not conditions.hold(args, {_at(args, 7): 3}, range(4, 18))


def squared(x: Tensor, n: int) -> Tensor:
    return x[:n] + 1 if n * n > 30 else x[:n]


def modulo(x: Tensor, n: int) -> Tensor:
    return x[:n] + 1 if n % 4 else x[:n]


@pytest.mark.parametrize("f", [squared, modulo])
def test_what_is_not_linear_is_not_told(f: Callable[..., Tensor]) -> None:
    conditions, args = _conditions(f, torch.ones(50), 7)
    assert not conditions.hold(args, {_at(args, 7): 0}, range(7, 9))


def other_than(x: Tensor, n: int, m: int) -> Tensor:
    return x[:n] * x[:m].sum() if n != m else x[:n]


def test_two_numbers_that_must_differ_may_not_meet_or_cross() -> None:
    conditions, args = _conditions(other_than, torch.ones(50), 7, 12)
    moving = {_at(args, 7): 0}
    assert conditions.hold(args, moving, range(7, 12))
    assert not conditions.hold(args, moving, range(7, 13))
    assert not conditions.hold(args, moving, range(7, 20))


def test_what_is_no_number_does_not_move() -> None:
    conditions, args = _conditions(lambda x, n: x[:n] * 2, torch.ones(50), 7)
    (tensor,) = (at for at, x in enumerate(args) if isinstance(x, Tensor))
    assert not conditions.hold(args, {tensor: 0}, range(7, 9))
