"""Which heads go together: groups of one size, each of heads that are alike."""

from __future__ import annotations

import torch
from torch import Tensor


def groups_of(similarity: Tensor, groups: int) -> Tensor:
    """An order of the heads, int64 `[heads]`, in which consecutive ones form the groups.

    `similarity` is `[heads, heads]`. Begins with neighbours and exchanges the two heads that gain
    most, until none do: the sum of similarities within groups never falls below the neighbours'.
    """
    count = len(similarity)
    size = count // groups
    own = torch.arange(count) // size
    alike = similarity.double().clone().fill_diagonal_(0.0)
    while True:
        to = alike @ torch.nn.functional.one_hot(own, groups).double()  # [heads, groups]
        moved = to[:, own] - to.gather(1, own[:, None])  # head a in the place of head b
        gain = moved + moved.T - 2 * alike
        gain[own[:, None] == own[None, :]] = 0.0
        best = int(gain.argmax())
        a, b = divmod(best, count)
        if not gain[a, b] > 1e-12 * count:
            return own.argsort(stable=True)
        own[a], own[b] = int(own[b]), int(own[a])
