"""Reading some heads of a cache gives what reading all does, and leaves the others alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.compiler import attend_routed
from attnopt.compiler.attend_routed import calls, to_active
from attnopt.compiler.attend_step import to_all
from attnopt.compiler.program import threads
from attnopt.compiler.spec import AttentionSpec
from tests.tolerance import assert_close

GROUPS, DIM, KEYS = 6, 8, 33
SOME = (False, True, True, False, True, False)


def case(
    group: int, extras: tuple[str, ...] = (), keys: int = KEYS
) -> tuple[AttentionSpec, list[Tensor], list[Tensor], Tensor]:
    torch.manual_seed(0)
    heads = group * GROUPS
    spec = AttentionSpec(heads, GROUPS, DIM, 5, 0.3, extras=extras)
    sizes = (heads, 1, DIM), (GROUPS, keys, DIM), (GROUPS, keys, 5)
    given = [torch.randn(1, *size, dtype=torch.float64) for size in sizes]
    made: dict[str, Tensor] = {
        "bias": torch.randn(1, heads, 1, keys, dtype=torch.float64),
        "keep": torch.arange(keys)[None, None, None] > 3,
        "padding": torch.arange(keys)[None] < keys - 2,
        "sinks": torch.randn(heads, 1, 1, dtype=torch.float64),
    }
    on = torch.tensor(SOME).repeat_interleave(group).view(1, heads, 1, 1)
    return spec, given, [made[name] for name in extras], on


@pytest.mark.parametrize("count", (1, 2))
@pytest.mark.parametrize("extras", ((), ("bias", "keep"), ("padding", "sinks")), ids=str)
@pytest.mark.parametrize("group", (1, 3))
def test_heads_that_are_on_give_what_they_did(
    group: int, extras: tuple[str, ...], count: int
) -> None:
    spec, (q, k, v), more, on = case(group, extras)
    expected = to_all(q, k, v, more, spec)
    for off in (0, 3, 5):  # keys and values that would spoil whatever reads them
        k[:, off] = v[:, off] = float("nan")
    with threads(count):
        at = calls(on, k, v, spec, least=0)
        assert at is not None
        made = to_active(q, k, v, more, spec, at)
    assert_close(made[:, on[0, :, 0, 0]], expected[:, on[0, :, 0, 0]])
    assert not made[:, ~on[0, :, 0, 0]].any()


def test_neighbours_are_one_call_unless_a_thread_would_wait() -> None:
    spec, (_, k, v), _, on = case(1)
    with threads(1):
        assert calls(on, k, v, spec, least=0) == [(1, 3), (4, 5)]
    on[:, 3] = True
    with threads(2):
        assert calls(on, k, v, spec, least=0) == [(1, 5)]
        on[:, 4] = False
        assert calls(on, k, v, spec, least=0) == [(1, 3), (3, 4)]


def test_it_is_left_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, (_, k, v), _, on = case(1)
    each = KEYS * (DIM + 5)  # three heads are off, and there are two calls
    with threads(1):
        assert calls(on, k, v, spec) is None
        assert calls(on, k, v, spec, least=3 * each // 2) is not None
        assert calls(on, k, v, spec, least=3 * each // 2 + 1) is None
        assert calls(torch.ones_like(on), k, v, spec, least=1) is None
        assert calls(on.expand(2, -1, -1, -1), *(x.expand(2, -1, -1, -1) for x in (k, v)), spec,
                     least=0) is None  # fmt: skip
        assert calls(on.expand(-1, -1, 2, -1), k, v, spec, least=0) is None
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert calls(on, k, v, spec, least=0) is None


def test_a_long_cache_is_worth_it() -> None:
    spec, _, _, on = case(1)
    spec = spec.with_(head_dim=64, v_dim=64)
    held: Any = torch.empty(1, device="meta").expand(1, GROUPS, 8192, 64)
    assert calls(on, held, held, spec) is None  # it is on no CPU
    long = torch.empty(1).expand(1, GROUPS, 8192, 64)
    with threads(1):
        assert calls(on, long, long, spec) is not None
        assert attend_routed.LEAST <= 3 * 8192 * 128 // 2
