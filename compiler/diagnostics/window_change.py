"""How far a sliding window would move what an attention gives, with the weights that are left
brought to sum 1 again.

The mass that a window drops says little by itself: a head that spreads over all keys gives nearly
the same mean from the near ones. With o_h a head's output and d_h its change, W_o its part of the
output projection: `moved` of a head is the root of sum |d_h W_o|^2 / sum |o_h W_o|^2, that of the
attention the same of the sums over heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.compiler.diagnostics.some_weights import Slice


class WindowChange:
    """Sums over rows for windows of each width beside the first `sink` keys."""

    def __init__(self, output: Tensor, widths: Sequence[int], sink: int, sink_logits: bool) -> None:
        """`output` `[heads, v_dim, width]` float64 is the output projection."""
        self.output, self.widths, self.sink = output, tuple(widths), sink
        self.sink_logits = sink_logits
        self.metric = output @ output.transpose(1, 2)
        heads = len(output)
        self.moved = torch.zeros(len(self.widths), heads, dtype=torch.float64)
        self.given = torch.zeros(heads, dtype=torch.float64)
        self.all_moved = torch.zeros(len(self.widths), dtype=torch.float64)
        self.all_given = torch.zeros((), dtype=torch.float64)

    def add(self, part: Slice, v: Tensor, real_keys: Tensor) -> None:
        """Add one slice of rows; v `[heads, T, v_dim]` of its sequence."""
        weights = part.weights
        out = weights @ v.to(weights.dtype)
        self.given += self._energy(out)
        self.all_given += self._together(out)
        away = (part.i[:, None] - torch.arange(len(real_keys))[None]).abs()
        first = ((real_keys.long().cumsum(0) <= self.sink) & real_keys)[None]
        beside = (1 - weights.sum(-1)).clamp(min=0) if self.sink_logits else 0.0
        for at, width in enumerate(self.widths):
            kept = weights * ((away < width) | first)
            total = (kept.sum(-1) + beside).clamp(min=torch.finfo(kept.dtype).tiny)
            change = (kept @ v.to(kept.dtype)) / total.unsqueeze(-1) - out
            self.moved[at] += self._energy(change)
            self.all_moved[at] += self._together(change)

    def per_head(self) -> dict[str, Tensor]:
        """`moved_<width>` `[heads]`; empty before any row."""
        if not bool(self.all_given > 0):
            return {}
        shares = (self.moved / self.given.clamp(min=1e-300)).sqrt()
        return {f"moved_{width}": shares[at] for at, width in enumerate(self.widths)}

    def whole(self) -> dict[str, float]:
        """`moved_<width>` of the attention as one."""
        if not bool(self.all_given > 0):
            return {}
        shares = (self.all_moved / self.all_given).sqrt().tolist()
        return {f"moved_{w}": round(share, 5) for w, share in zip(self.widths, shares, strict=True)}

    def _energy(self, out: Tensor) -> Tensor:
        """Sum over rows of |o_h W_o|^2, `[heads]`."""
        wide = out.double()
        return (wide @ self.metric * wide).sum((1, 2)).clamp(min=0)

    def _together(self, out: Tensor) -> Tensor:
        joined = out.transpose(0, 1).flatten(1)
        made = joined @ self.output.flatten(0, 1).to(joined.dtype)
        return made.double().square().sum()
