"""Where Triton multiplies tiles by matrix instructions, and where one number at a time."""

from __future__ import annotations

from attnopt.codegen.target import Target


def matrix_units(target: Target, dtype: str) -> bool:
    """Whether Triton multiplies tiles of the dtype by the target's matrix instructions.

    It has none for NVIDIA before Ampere, although a T4 has matrix units, nor for float32 without
    tf32 on NVIDIA. Elsewhere every thread holds its rows and columns in registers, in float32:
    tiles have to be small, and products take the float32 peak.
    """
    if target.vendor == "amd":
        return True
    return float(target.capability) >= 8.0 and dtype != "float32"
