"""`Number`: a figure of a report, with how sure it is and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["measured", "estimated"]


@dataclass(frozen=True)
class Number:
    """A value with its two-sided 95% interval (`low` to `high`, where known) and where it comes
    from.

    Ratios and shares have no unit; drops and shares are fractions (0.01 is 1%). `note` names the
    model that made an estimate, or how the interval is to be read where it is not a 95% one.
    """

    value: float
    kind: Kind
    low: float | None = None
    high: float | None = None
    unit: str = ""
    note: str = ""
