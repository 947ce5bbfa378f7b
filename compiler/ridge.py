"""Ridge regression towards a weight at hand, from second moments alone.

W = W0 + (X^T X + lambda I)^-1 X^T (Y - X W0), lambda = damping * mean diag(X^T X): the error on the
rows that were summed cannot rise, and directions that they never show stay as they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.compiler.grams import Gram


def solve(sums: Gram, old: Tensor, damping: float) -> tuple[Tensor, float]:
    """Ridge regression towards `old` `[p, r]` from moments.

    Also the relative norm of the gradient at the solution.
    """
    ridge = damping * sums.xx.diagonal().mean().clamp(min=1e-30)
    regular = sums.xx + ridge * torch.eye(len(sums.xx), dtype=torch.float64)
    step = sums.xy - sums.xx @ old
    factor = torch.linalg.cholesky(regular)
    delta = torch.cholesky_solve(step, factor)
    delta = delta + torch.cholesky_solve(step - regular @ delta, factor)  # one refinement
    gradient = float((regular @ delta - step).norm() / sums.xy.norm().clamp(min=1e-300))
    return old + delta, gradient
