"""Where Triton multiplies tiles by matrix instructions, and where one number at a time."""

from __future__ import annotations

from attnopt.codegen.target import Target
from attnopt.compiler.contract import Miss


def matrix_units(target: Target, dtype: str) -> bool:
    """Whether Triton multiplies tiles of the dtype by the target's matrix instructions.

    It has none for NVIDIA before Ampere, although a T4 has matrix units, nor for float32 without
    tf32 on NVIDIA. Elsewhere every thread holds its rows and columns in registers, in float32:
    tiles have to be small, and products take the float32 peak.
    """
    if target.vendor == "amd":
        return True
    return float(target.capability) >= 8.0 and dtype != "float32"


def below_ampere(target: Target, limit: str) -> Miss | None:
    """Why tiles beyond `limit` cannot be multiplied on the target, None where Triton has matrix
    instructions for it."""
    if matrix_units(target, "float16"):
        return None
    return Miss(
        f"{limit} on {target.title}: Triton has no matrix instructions below compute capability "
        "8.0, and multiplies one number at a time there",
        help="torch's own kernels use this device's matrix units",
    )
