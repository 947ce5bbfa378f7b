"""Block influence of a residual sublayer: 1 - mean cos(x_in, x_out) over real tokens.

x_out is the residual stream after the branch was added, x_in what it was added to. Near 0 the
branch hardly turns the stream. Source: ShortGPT (Men et al. 2024, arXiv 2403.03853), equation 1,
taken per sublayer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from attnopt.compiler.diagnostics.diagnosis import SublayerDiagnosis
from attnopt.compiler.grams import real, rows
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.removal import bypass_of, exit_of
from attnopt.compiler.site import Sublayer
from attnopt.compiler.skip_order import apart


class Influence:
    """Adds up the cosines of one sublayer; `node` is the sum to watch, "" where there is none."""

    def __init__(self, program: Program, layer: Sublayer) -> None:
        self.program, self.layer, self.node, self.reason = program, layer, "", ""
        self.total, self.tokens = 0.0, 0
        try:
            self.before, self.node = bypass_of(program, layer), exit_of(program, layer).name
        except KeyError as missing:
            self.reason = str(missing.args[0])

    def see(self, read: Mapping[fx.Node, Any], value: Any, batch: Batch) -> None:
        """Add the tokens of one batch."""
        before = read[self.before]
        if before.shape != value.shape:
            self.reason = f"it adds {list(before.shape)} to make {list(value.shape)}"
            return
        valid = real(self.program, self.node, batch)
        far = apart(rows(before, valid), rows(value, valid))
        self.total += float(far.sum())
        self.tokens += len(far)

    def result(self) -> SublayerDiagnosis:
        """What was found."""
        layer, value = self.layer, None
        if not self.reason and self.tokens:
            value = max(0.0, self.total / self.tokens)
        reason = self.reason or ("" if self.tokens else "the data never reaches it")
        return SublayerDiagnosis(
            layer.id, layer.kind, layer.block, layer.module, value, self.tokens, reason
        )
