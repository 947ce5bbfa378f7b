"""Compiling a recorded launch for a target that need not be here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from attnopt.codegen.record import Launch
from attnopt.codegen.target import Target
from attnopt.compiler.errors import Problem

_POINTERS: Mapping[torch.dtype, str] = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.float64: "*fp64", torch.bool: "*i1", torch.uint8: "*u8", torch.int8: "*i8",
    torch.int32: "*i32", torch.int64: "*i64", torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}  # fmt: skip
_ALIGNED = 16  # bytes of a pointer, or steps of a whole number, that the compiler may rely on
_WAVE = {"nvidia": 32, "amd": 64}


def compiled(launch: Launch, target: Target) -> Any:
    """The launch's kernel as triton compiles it for the target: `.asm` holds its texts and binary,
    `.metadata.shared` the bytes of shared memory of a block.

    Raises `Problem` A803 for the CPU, and whatever triton raises where it cannot compile.
    """
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        elif parameter.do_not_specialize:  # one code for every whole number
            signature[parameter.name] = "i32"
        else:
            signature[parameter.name] = _typed(value, (place,), constants, attributes)
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=gpu(target), options=dict(launch.options))


def gpu(target: Target) -> GPUTarget:
    """The target as triton names it. Raises `Problem` A803 for the CPU."""
    if target.vendor not in _WAVE:
        raise Problem(
            "A803", f"Triton has no code for {target.title}",
            help="name a GPU: attnopt codegen --target h100",
        )  # fmt: skip
    if target.vendor == "amd":
        return GPUTarget("hip", target.capability, 64)
    return GPUTarget("cuda", int(target.capability.replace(".", "")), 32)


def _typed(value: Any, place: tuple[int, ...], constants: Any, attributes: Any) -> Any:
    """The type of an argument in triton's words; as the launch would, numbers of 1 become constants
    and multiples of 16 are told."""
    if isinstance(value, tuple):
        return tuple(
            _typed(item, (*place, at), constants, attributes) for at, item in enumerate(value)
        )
    if value is None or (type(value) is int and value == 1):
        constants[place] = value
        return "constexpr"
    if isinstance(value, Tensor):
        attributes[place] = [["tt.divisibility", _ALIGNED]]
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        if value % _ALIGNED == 0:
            attributes[place] = [["tt.divisibility", _ALIGNED]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"
