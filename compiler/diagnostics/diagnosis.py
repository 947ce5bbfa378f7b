"""`Diagnosis`: what was measured of a model's attentions and sublayers, as frozen values that go
into reports.

Figures are kept by name, so that a figure that could not be measured is absent and `missing` says
why. The names, and what each one says of a rewrite, are in docs/cli.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Row = tuple[float, ...]


@dataclass(frozen=True)
class SiteDiagnosis:
    """One attention, measured on calibration data.

    `per_head` holds one value per query head (per key/value head for `kv_rank` and `kv_rank99`);
    `spectra` singular values per head, descending, their squares adding up to 1; `similarity`
    square matrices over query heads (`maps`) or key/value heads (`keys`, `values`); `whole` figures
    of the site as one. `queries` is the number of query positions whose maps were read.
    """

    id: str
    module: str
    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    per_head: Mapping[str, Row] = field(default_factory=dict)
    spectra: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    similarity: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    whole: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """The mean of a figure over the heads, None where it is missing."""
        row = self.per_head.get(name)
        return sum(row) / len(row) if row else None


@dataclass(frozen=True)
class SublayerDiagnosis:
    """One residual sublayer: its block influence, 1 - mean cos(in, out) over `tokens` real tokens,
    or the `reason` why it is None."""

    id: str
    kind: str
    block: int
    module: str
    influence: float | None
    tokens: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All sites and sublayers, measured on `tokens` real tokens in `seconds`.

    `widths` are the windows (in keys) of the local masses, `sink` how many first keys count as
    sinks. `skipped` says why nothing was measured, where nothing was.
    """

    sites: tuple[SiteDiagnosis, ...] = ()
    sublayers: tuple[SublayerDiagnosis, ...] = ()
    widths: tuple[int, ...] = ()
    sink: int = 4
    sequences: int = 0
    tokens: int = 0
    seed: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    skipped: str = ""
