"""What a head adds to the output of an attention, and what it costs to do without it.

Z holds the heads' results as the output projection W reads them, one row per token, and G = Z^T Z.
Head B alone adds Z_B W_B, of energy tr(W_B^T G_BB W_B). Where the other heads' rows of W are fitted
again, doing without it costs less, what they cannot express:

    cost(B) = tr(W_B^T ((G^-1)_BB)^-1 W_B),

the optimal brain surgeon's formula for a block of rows. Greedy: remove the cheapest block, set
W <- W - G^-1_:B ((G^-1)_BB)^-1 W_B, take B out of G^-1 likewise, and go on; the costs add up to the
residual of the last least squares fit. Source: OSSCAR (Meng et al. 2024), section 3; Hassibi and
Stork 1993.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.compiler.grams import Gram
from attnopt.compiler.ridge import solve

WEAKEST = 1e-9  # of the mean diagonal: for directions that the data never shows
USUAL = 1e-3  # where there is no held-out data to choose by
DAMPINGS = (WEAKEST, 1e-4, USUAL, 1e-2, 1e-1)


@dataclass(frozen=True)
class Results:
    """The heads' results Z of one attention by second moments, and the weight that reads them.

    `gram` `[p, p]` float64 with p = heads * v_dim, or one more, a constant, where the output
    projection has a bias; `weight` `[p, width]`, its last row then zero: what is fitted is the
    change of the bias.
    """

    gram: Tensor
    weight: Tensor

    @staticmethod
    def of(moments: Gram, channels: Tensor, rows: Tensor, with_bias: bool) -> Results:
        """From the moments of the projection's input with a constant column.

        `channels` `[heads, v_dim]` says which input column is whose, `rows`
        `[heads, v_dim, width]` is the weight.
        """
        order = channels.reshape(-1)
        weight = rows.reshape(order.numel(), -1)
        if with_bias:
            order = torch.cat((order, torch.tensor([len(moments.xx) - 1])))
            weight = torch.cat((weight, torch.zeros_like(weight[:1])))
        return Results(moments.xx[order][:, order], weight)

    @property
    def energy(self) -> float:
        """The sum over tokens of |Z W|^2."""
        return _energy(self.gram, self.weight)

    def energies(self, blocks: Sequence[Tensor]) -> list[float]:
        """The energy that each block of rows adds on its own."""
        return [_energy(self.gram[b][:, b], self.weight[b]) for b in blocks]

    def cheapest(self, blocks: Sequence[Tensor], count: int) -> tuple[list[int], float]:
        """The `count` blocks that cost least to remove, one after the other, and the share of
        energy that is lost when the weight of the others is fitted again."""
        inverse, weight = self._inverse(), self.weight.clone()
        lost, gone = 0.0, list[int]()
        for _ in range(count):
            left = [at for at in range(len(blocks)) if at not in gone]
            costs = [_cost(inverse, weight, blocks[at]) for at in left]
            least = min(range(len(left)), key=lambda i: costs[i])
            block = blocks[left[least]]
            gone.append(left[least])
            lost += costs[least]
            step = torch.linalg.solve(inverse[block][:, block], inverse[block])
            weight = weight - step.T @ weight[block]
            inverse = inverse - inverse[:, block] @ step
        return gone, lost / max(self.energy, 1e-300)

    def cost(self, block: Tensor) -> float:
        """The share of energy that is lost without these rows, the others fitted again."""
        return _cost(self._inverse(), self.weight, block) / max(self.energy, 1e-300)

    def _inverse(self) -> Tensor:
        ridge = WEAKEST * self.gram.diagonal().mean().clamp(min=1e-30)
        eye = torch.eye(len(self.gram), dtype=torch.float64)
        inverse: Tensor = torch.linalg.inv(self.gram + ridge * eye)
        return inverse

    def fitted(self, by: Tensor, old: Tensor, damping: float) -> Tensor:
        """The weight `[less, width]` that gives the whole result best from fewer numbers, leaning
        towards `old`. `by` says which: rows that stay, or a map `[p, less]` of all."""
        return solve(self._sums(by), old, damping)[0]

    def lost(self, by: Tensor, weight: Tensor) -> float:
        """The share of energy that fewer numbers with this weight do not give."""
        return self._sums(by).error(weight) / max(self.energy, 1e-300)

    def _sums(self, by: Tensor) -> Gram:
        left = self.gram[by] if by.dim() == 1 else by.T @ self.gram
        return Gram(left[:, by] if by.dim() == 1 else left @ by, left @ self.weight, self.energy)


def best_weight(
    train: Results, check: Results | None, by: Tensor, old: Tensor
) -> tuple[Tensor, float | None]:
    """The weight for fewer numbers (see `Results.fitted`) that loses least on held-out data, and
    its damping; None where `old` does. Without such data the usual damping."""
    if check is None:
        return train.fitted(by, old, USUAL), USUAL
    given: list[tuple[Tensor, float | None]] = [(old, None)]
    given += [(train.fitted(by, old, damping), damping) for damping in DAMPINGS]
    lost = [check.lost(by, weight) for weight, _ in given]
    return given[lost.index(min(lost))]


def _energy(gram: Tensor, weight: Tensor) -> float:
    return float((weight * (gram @ weight)).sum())


def _cost(inverse: Tensor, weight: Tensor, block: Tensor) -> float:
    own = weight[block]
    return float((own * torch.linalg.solve(inverse[block][:, block], own)).sum())
