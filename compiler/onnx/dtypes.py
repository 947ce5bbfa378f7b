"""ONNX's numbers for element types, as torch's dtypes."""

from __future__ import annotations

import torch

from attnopt.compiler.errors import Problem

_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32,
    7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip


def torch_dtype(number: int, where: str) -> torch.dtype:
    """The dtype for an element type of ONNX. Raises `Problem` A128 for those that torch or this
    reader has no tensors of."""
    found = _DTYPES.get(number)
    if found is not None:
        return found
    from onnx import TensorProto

    known = TensorProto.DataType.values()
    name = TensorProto.DataType.Name(number) if number in known else str(number)
    raise Problem(
        "A128",
        f"tensors of type {name} cannot be read",
        where=where,
        why="strings, complex numbers and quantised types are not supported",
        help="export the model in float32 or float16, without quantisation",
    )
