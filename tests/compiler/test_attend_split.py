"""Attention split along the keys gives what the whole gives, however they are cut."""

from __future__ import annotations

import pytest
import torch

from attnopt.compiler import attend_split
from attnopt.compiler.attend_split import merged, parts_for, split_keys
from attnopt.compiler.attend_step import to_all
from attnopt.compiler.spec import AttentionSpec
from tests.tolerance import assert_close


def operands(keys: int, batch: int = 1, heads: int = 6) -> list[torch.Tensor]:
    shapes = (batch, heads, 1, 16), (batch, 1, keys, 16), (batch, 1, keys, 16)
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize("keys", [8, 9, 15, 1031])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_any_cut_is_exact(keys: int, parts: int) -> None:
    q, k, v = operands(keys, batch=2)
    q = q.transpose(1, 2)
    whole = (q.double() @ k.double().transpose(2, 3) * 0.3).softmax(-1) @ v.double()
    assert_close(split_keys(q, k, v, 0.3, parts), whole.float())


def test_parts_without_a_key_count_nothing() -> None:
    outs, sums = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4)
    sums[:, 1] = float("-inf")
    sums[1] = float("-inf")
    made = merged(outs, sums)
    shares = sums[0, [0, 2]].softmax(0)
    assert_close(made[0, 0], (shares[..., None] * outs[0, [0, 2]]).sum(0))
    assert torch.equal(made[1], torch.zeros_like(made[1]))


def test_a_compiled_step_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_split, "SHORTEST", 16)
    spec = AttentionSpec(6, 1, 16, 16, 0.25)
    run = torch.compile(
        lambda q, k, v: to_all(q, k, v, [], spec), backend="eager", dynamic=True, fullgraph=True
    )
    for keys in (12, 40):
        q, k, v = operands(keys)
        assert_close(run(q, k, v), (q @ k.transpose(2, 3) * 0.25).softmax(-1) @ v)


def test_a_lone_head_is_split_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    q, k, v = operands(1500)
    assert parts_for(q, k, v) == 4
    assert parts_for(*operands(1500, batch=3)) == 1
    assert parts_for(*operands(1000)) == 1
    assert parts_for(q, k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1)) == 1
    assert parts_for(q, k, v[..., :8]) == 1  # torch's kernel wants one width
    assert parts_for(q, k, v.bfloat16()) == 1  # and one dtype, which autocast does not give
    called = []

    def counted(*given: object) -> torch.Tensor:
        called.append(given)
        return split_keys(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("attnopt.compiler.attend_step.split_keys", counted)
    spec = AttentionSpec(6, 1, 16, 16, 0.25)
    made = to_all(q, k, v, [], spec)
    whole = (q @ k.transpose(2, 3) * 0.25).softmax(-1) @ v
    assert called and attend_split.SHORTEST < 1500
    assert_close(made, whole)
