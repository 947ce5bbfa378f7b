"""The arguments of launchers that say what is computed: of a mask, and of the precision."""

from __future__ import annotations

from typing import Any

from attnopt.compiler.errors import Problem
from attnopt.compiler.spec import Mask

PRECISIONS = ("ieee", "tf32")


def mask_arguments(mask: Mask) -> dict[str, Any]:
    """The launcher's arguments for a mask of a spec."""
    causal = mask.kind == "causal" or (mask.kind == "window" and mask.causal)
    return {
        "causal": causal, "window": mask.kind == "window", "left": mask.left, "sink": mask.sink,
    }  # fmt: skip


def precision_argument(precision: str) -> dict[str, str]:
    """How products of float32 operands are made: exactly ("ieee", and launchers need not be told),
    or of operands that are rounded to tf32, with 10 bits of fraction in the place of 23. Other
    operands are as they are.

    Raises `Problem` A802 on another word.
    """
    if precision not in PRECISIONS:
        raise Problem(
            "A802", f"`precision` of a kernel cannot be {precision!r}",
            help=f"one of {', '.join(PRECISIONS)}",
        )  # fmt: skip
    return {} if precision == "ieee" else {"precision": precision}
