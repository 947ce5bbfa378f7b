"""How close is equal: the one place where a test's tolerance comes from."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDINGS = 2  # a half-precision result is rounded on storing and once more in between


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """Relative and absolute tolerance `(rtol, atol)` for values of order one held in `dtype`.

    1e-10 for float64 and 1e-5 for float32 leave room for a sum taken in another order; half
    precisions get two units of their own rounding; whole numbers and truth values get none.
    """
    if dtype in (torch.float64, torch.complex128):
        return 1e-10, 1e-10
    if dtype in (torch.float32, torch.complex64):
        return 1e-5, 1e-5
    if dtype.is_floating_point:
        eps = torch.finfo(dtype).eps
        return _ROUNDINGS * eps, _ROUNDINGS * eps
    return 0.0, 0.0


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Fail unless both have one shape and agree within the tolerance of the coarser dtype.

    A float32 result may so be held against a float64 reference. NaN agrees with nothing, and
    neither does a non-finite result with a finite reference. `what` names the pair on failure.
    """
    rtol, atol = max(tolerance(actual.dtype), tolerance(expected.dtype))
    kind = torch.complex128 if actual.is_complex() or expected.is_complex() else torch.float64
    torch.testing.assert_close(
        actual.detach().cpu().to(kind),
        expected.detach().cpu().to(kind),
        rtol=rtol,
        atol=atol,
        msg=(lambda told: f"{what}: {told}") if what else None,
    )
