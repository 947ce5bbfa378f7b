"""The linear map that is closest to a sublayer: linear minimum mean square error (LMMSE).

For rows x `[in]` and y `[out]` with means m_x, m_y and centred second moments S_xx, S_xy, S_yy,

    W = (S_xx + lambda I)^-1 S_xy,    b = m_y - m_x W,    lambda = ridge * mean diag(S_xx),

minimises E |y - x W - b|^2 (at lambda = 0). All sums and solves are in float64. What is left is
known without running the map: tr(S_yy) - 2 tr(W^T S_xy) + tr(W^T S_xx W).

The canonical correlations rho of x and y bound how linear the branch is at all: the error after
whitening y is the sum of 1 - rho_i^2. Source: NBL (arXiv 2505.21077), section 3; the ridge is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.compiler.grams import Gram

RIDGE = 1e-9  # enough for directions that the data never shows, too little to bend the others
RIDGES = (RIDGE, 1e-4, 1e-2)  # to choose from on held-out rows


@dataclass(frozen=True)
class LinearMap:
    """y = x `weight` + `bias` with `weight` `[in, out]` and `bias` `[out]`, float64.

    `residual` is the share of y's variance that is left over the rows it was fitted on (0 to 1),
    `rows` their number.
    """

    weight: Tensor
    bias: Tensor
    residual: float
    rows: int

    def __call__(self, x: Tensor) -> Tensor:
        """The map of x `[..., in]`, in float64."""
        return x.double() @ self.weight + self.bias


def fit(sums: Gram, ridge: float = RIDGE) -> LinearMap:
    """The map from sums over rows `[x, 1]` and y: `xx` `[in + 1, in + 1]`, `xy` `[in + 1, out]`.

    Raises ValueError when no row was added.
    """
    return fits(sums, (ridge,))[0]


def fits(sums: Gram, ridges: Sequence[float] = RIDGES) -> list[LinearMap]:
    """One map per ridge from the same sums, as `fit` makes it."""
    if not sums.rows:
        raise ValueError("no calibration rows")
    mean_x, mean_y = sums.xx[-1, :-1] / sums.rows, sums.xy[-1] / sums.rows
    s_xx, s_xy = _centred(sums)
    values, vectors = torch.linalg.eigh(s_xx)
    turned = vectors.T @ s_xy
    made: list[LinearMap] = []
    for ridge in ridges:
        shifted = values.clamp(min=0.0) + ridge * float(s_xx.diagonal().mean())
        inverse = torch.where(shifted > 0, 1.0 / shifted, torch.zeros_like(shifted))
        weight = vectors @ (inverse[:, None] * turned)
        bias = mean_y - mean_x @ weight
        made.append(LinearMap(weight, bias, residual(sums, weight, bias), sums.rows))
    return made


def residual(sums: Gram, weight: Tensor, bias: Tensor) -> float:
    """The share of y's variance that x `weight` + `bias` leaves over the rows of `sums`.

    `weight` `[in, out]` and `bias` `[out]` may come from other rows; the share may then exceed 1.
    """
    left = sums.error(torch.cat((weight.double(), bias.double()[None])))
    return left / max(variance(sums), 1e-300)


def variance(sums: Gram) -> float:
    """Sum of |y - mean y|^2 over the rows."""
    mean_y = sums.xy[-1] / sums.rows
    return max(0.0, sums.yy - sums.rows * float(mean_y.square().sum()))


def correlations(sums: Gram, yy: Tensor) -> Tensor:
    """Canonical correlations of x and y, `[min(in, out)]` from 1 down to 0.

    `yy` `[out, out]` is the sum of y y^T over the same rows.
    """
    s_xx, s_xy = _centred(sums)
    mean_y = sums.xy[-1] / sums.rows
    s_yy = yy - sums.rows * torch.outer(mean_y, mean_y)
    whitened = _root_inverse(s_xx) @ s_xy @ _root_inverse(s_yy)
    values: Tensor = torch.linalg.svdvals(whitened)
    return values.clamp(max=1.0)


def _centred(sums: Gram) -> tuple[Tensor, Tensor]:
    mean_x, mean_y = sums.xx[-1, :-1] / sums.rows, sums.xy[-1] / sums.rows
    s_xx = sums.xx[:-1, :-1] - sums.rows * torch.outer(mean_x, mean_x)
    s_xy = sums.xy[:-1] - sums.rows * torch.outer(mean_x, mean_y)
    return s_xx, s_xy


def _root_inverse(moments: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moments)
    keep = values > 1e-12 * values[-1]
    root: Tensor = (vectors[:, keep] / values[keep].sqrt()) @ vectors[:, keep].T
    return root
