"""The closed-form linear map: exact where there is one; its residual is the measured one."""

from __future__ import annotations

import pytest
import torch

from attnopt.compiler.grams import Gram, with_one
from attnopt.compiler.lmmse import correlations, fit, residual, variance
from tests.tolerance import assert_close


def data(rows: int = 301, width: int = 7, out: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, width, dtype=torch.float64) @ torch.randn(width, width).double() + 2.0
    y = torch.tanh(x @ torch.randn(width, out).double()) + x[:, :out]
    return x, y


def sums(x: torch.Tensor, y: torch.Tensor, batches: int = 3) -> Gram:
    made = Gram.empty(x.shape[1] + 1, y.shape[1])
    for a, b in zip(x.chunk(batches), y.chunk(batches), strict=True):
        made.add(with_one(a), b)
    return made


def test_is_the_least_squares_solution() -> None:
    x, y = data()
    made = fit(sums(x, y), ridge=0.0)
    expected = torch.linalg.lstsq(with_one(x), y).solution
    assert_close(torch.cat((made.weight, made.bias[None])), expected)


@pytest.mark.parametrize("ridge", [0.0, 1e-9, 1e-2])
def test_the_residual_is_the_measured_one(ridge: float) -> None:
    x, y = data()
    made = fit(sums(x, y), ridge)
    measured = float((made(x) - y).square().sum() / (y - y.mean(0)).square().sum())
    assert made.residual == pytest.approx(measured, rel=1e-6)
    assert made.residual > 1e-3


def test_a_linear_map_is_found_exactly() -> None:
    x, _ = data()
    weight, bias = torch.randn(7, 3).double(), torch.randn(3).double()
    made = fit(sums(x, x @ weight + bias), ridge=0.0)
    assert_close(made.weight, weight)
    assert_close(made.bias, bias)
    assert made.residual < 1e-12


def test_constant_columns_do_not_blow_it_up() -> None:
    x, y = data()
    x = torch.cat((x, torch.full_like(x[:, :2], 3.0)), dim=1)
    made = fit(sums(x, y))
    assert made.weight.abs().max() < 1e3
    assert made.residual == pytest.approx(fit(sums(*(x[:, :7], y))).residual, rel=1e-5)


def test_other_rows_may_leave_more_than_there_was() -> None:
    x, y = data()
    made = fit(sums(x, y))
    assert residual(sums(x, -y), made.weight, made.bias) > 1.0
    assert variance(sums(x, y)) == pytest.approx(float((y - y.mean(0)).square().sum()))


def test_canonical_correlations() -> None:
    x, y = data()
    mixed = torch.cat((x[:, :2], torch.randn(len(x), 2).double()), dim=1)
    found = correlations(sums(x, mixed), mixed.T @ mixed)
    assert_close(found[:2], torch.ones(2).double())
    assert found[2] < 0.5
    whitened = float((1 - correlations(sums(x, y), y.T @ y).square()).sum())
    assert 0 < whitened < y.shape[1]


def test_nothing_to_fit_on() -> None:
    with pytest.raises(ValueError, match="no calibration rows"):
        fit(Gram.empty(4, 3))
