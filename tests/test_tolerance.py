"""The measuring rod itself: it accepts rounding and refuses everything else."""

from __future__ import annotations

import pytest
import torch

from tests.tolerance import assert_close, tolerance

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_rounding_is_close_and_a_hundred_tolerances_are_not(dtype: torch.dtype) -> None:
    one = torch.ones(3, dtype=dtype)
    assert_close(one, one + torch.finfo(dtype).eps)
    with pytest.raises(AssertionError):
        assert_close(one, one + 100 * tolerance(dtype)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_result_is_never_close(bad: float) -> None:
    broken = torch.tensor([1.0, bad])
    with pytest.raises(AssertionError):
        assert_close(broken, torch.ones(2))
    if bad != bad:
        with pytest.raises(AssertionError):
            assert_close(broken, broken)


def test_shapes_do_not_broadcast() -> None:
    with pytest.raises(AssertionError):
        assert_close(torch.ones(2, 1), torch.ones(2))


def test_the_coarser_dtype_decides() -> None:
    reference = torch.full((2,), 1.0, dtype=torch.float64)
    assert_close(reference.float() + 1e-6, reference)
    with pytest.raises(AssertionError):
        assert_close(reference + 1e-6, reference)


def test_whole_numbers_are_equal_or_not() -> None:
    assert tolerance(torch.int64) == tolerance(torch.bool) == (0.0, 0.0)
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1]), torch.tensor([2]))


def test_a_failure_names_the_pair() -> None:
    with pytest.raises(AssertionError, match="layer 3"):
        assert_close(torch.zeros(1), torch.ones(1), what="layer 3")
