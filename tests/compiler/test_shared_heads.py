"""The closed forms on random heads: exact where they can be, optimal and as predicted where not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.compiler.gauge import Freedom, complex_scalars
from attnopt.compiler.shared_heads import keys, mean, principal, root
from tests.tolerance import assert_close

HEADS, DIM, WIDTH, GROUPS = 4, 8, 11, 2
PAIRS = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
SCALE, TURN, NONE = Freedom("scale", True), Freedom("turn", False), Freedom("none", False)


def heads() -> Tensor:
    return torch.randn(HEADS, DIM, WIDTH, dtype=torch.float64)


def gram(rows: int = 60) -> Tensor:
    x = torch.randn(rows, WIDTH, dtype=torch.float64)
    x[:, -1] = 1.0
    return x.T @ x


def moments() -> Tensor:
    q = torch.randn(HEADS, DIM, 30, dtype=torch.float64) * torch.rand(HEADS, DIM, 1).double()
    return q @ q.transpose(1, 2)


def turned(pairs: Tensor) -> Tensor:
    """Heads of which the second of each group is the first, times a complex number per pair."""
    made = heads()
    for h in range(1, HEADS, 2):
        factors = torch.randn(len(pairs), dtype=torch.complex128)
        made[h] = complex_scalars(DIM, pairs, factors) @ made[h - 1]
    return made


def test_heads_that_are_turns_of_each_other_share_a_key_exactly() -> None:
    made, c = turned(PAIRS), gram()
    shared = keys(made, c, GROUPS, moments(), PAIRS, SCALE)
    assert_close(shared.expand @ shared.weight.repeat_interleave(2, 0), made)
    assert shared.tail is not None
    assert shared.tail < 1e-12
    assert shared.residual(made, c) < 1e-20


def test_heads_that_are_any_images_of_each_other_share_a_value_exactly() -> None:
    made, c = heads(), gram()
    made[1::2] = torch.randn(2, DIM, DIM, dtype=torch.float64) @ made[::2]
    shared = principal(made, c, GROUPS, root(moments()))
    assert_close(shared.expand @ shared.weight.repeat_interleave(2, 0), made)


def test_the_maps_of_keys_commute_with_rotary() -> None:
    shared = keys(heads(), gram(), GROUPS, moments(), PAIRS[:3], SCALE)
    turn = complex_scalars(DIM, PAIRS[:3], torch.polar(torch.ones(3), torch.rand(3) * 6))
    assert_close(shared.expand @ turn, turn @ shared.expand)


def test_a_reflection_is_no_turn() -> None:
    made = heads()
    made[1::2] = made[::2] * torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=torch.float64)[:, None]
    assert keys(made, gram(), GROUPS, moments(), PAIRS, SCALE).residual(made, gram()) > 0.05


@pytest.mark.parametrize("pairs", (PAIRS, PAIRS[:2], PAIRS[:0]), ids=("full", "partial", "none"))
def test_the_prediction_is_the_residual_and_beats_the_mean(pairs: Tensor) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        made, c, query = heads(), gram(), moments()
        shared = keys(made, c, GROUPS, query, pairs, SCALE)
        assert shared.tail is not None
        assert abs(shared.tail - shared.residual(made, c)) < 1e-9
        assert shared.residual(made, c) <= mean(made, GROUPS, shared.metric).residual(made, c)


def test_no_turn_of_the_mean_is_better_than_the_closed_form() -> None:
    made, c, query = heads(), gram(), moments()
    best = keys(made, c, GROUPS, query, PAIRS, SCALE)
    for _ in range(50):
        maps = torch.stack(
            [
                complex_scalars(DIM, PAIRS, torch.polar(torch.ones(4), torch.rand(4) * 6.3))
                for _ in range(HEADS)
            ]
        )
        aligned = mean(torch.linalg.solve(maps, made), GROUPS, best.metric)
        other = type(best)(aligned.weight, maps, best.metric)
        assert best.residual(made, c) <= other.residual(made, c)


def test_behind_a_norm_the_maps_are_turns() -> None:
    made = turned(PAIRS)
    shared = keys(made, gram(), GROUPS, moments(), PAIRS, TURN)
    eye = torch.eye(DIM, dtype=torch.float64)
    assert_close(shared.expand @ shared.expand.transpose(1, 2), eye.expand(HEADS, -1, -1))
    assert_close(torch.linalg.det(shared.expand), torch.ones(HEADS, dtype=torch.float64))
    assert shared.tail is None


def test_without_freedom_keys_are_the_mean() -> None:
    made = heads()
    shared = keys(made, gram(), GROUPS, moments(), PAIRS, NONE)
    assert_close(shared.weight[0], (made[0] + made[1]) / 2)
    assert_close(shared.expand[3], torch.eye(DIM, dtype=torch.float64))


def test_a_head_that_no_query_asks_for_gives_way() -> None:
    made, query = heads(), moments()
    query[1] *= 1e-8
    shared = keys(made, gram(), GROUPS, query, PAIRS, SCALE)
    lost = made - shared.expand @ shared.weight.repeat_interleave(2, 0)
    assert lost[0].norm() < 1e-3 * made[0].norm()
    assert lost[1].norm() > 0.3 * made[1].norm()


def test_dead_heads_and_queries_give_finite_numbers() -> None:
    made, query = heads(), moments()
    made[0], query[2:] = 0.0, 0.0
    for pairs in (PAIRS, PAIRS[:0]):
        shared = keys(made, gram(), GROUPS, query, pairs, SCALE)
        assert shared.weight.isfinite().all()
        assert shared.expand.isfinite().all()


def test_the_root_squares_to_the_moments() -> None:
    given = moments()
    assert (root(given) @ root(given) - given).abs().max() < 1e-5 * given.abs().max()
